"""Shadows: copies of a layer on which the engine's own post-processing runs without touching what serves.

A shadow shares nothing that post-processing writes: it has its own tables of parameters, buffers and attributes, and
its quantisation method, that method's kernels and the containers and tensors that they hold are copies too. What
belongs to the whole engine, functions and native matrices are shared.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.vllm.reach import DEPTH, TABLES, attributes, is_native, is_walked, reached

Tensor = torch.Tensor

_DICTS = (dict, OrderedDict, defaultdict)
_DEPTH = 2 * DEPTH
"""Copies are made depth first: twice as deep, so that all that is looked at is copied, by whichever path it is met."""

ALREADY = "_already_called_process_weights_after_loading"
"""What some methods set on a layer, and vLLM's own reload takes off again."""


def make_shadow(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a layer that holds ``tensors`` instead of its own.

    Args:
        layer: stays as it is, whatever runs on the shadow.
        tensors: by attribute name; buffers where the layer has buffers of that name.
    """
    shadow: nn.Module = layer.__class__.__new__(layer.__class__)
    copies = _Copies()
    copies.know(layer, shadow)
    method = getattr(layer, "quant_method", None)
    twin = copies.of(method, _DEPTH) if not isinstance(method, nn.Module) else copies.of_module(method)
    own = {name: value for name, value in layer.__dict__.items() if name not in TABLES and name != ALREADY}
    shadow.__dict__.update((name, copies.of(value, _DEPTH)) for name, value in own.items())
    shadow.__dict__["_parameters"] = {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter)}
    shadow.__dict__["_buffers"] = {name: t for name, t in tensors.items() if not isinstance(t, nn.Parameter)}
    shadow.__dict__["_modules"] = {name: twin if m is method else m for name, m in layer._modules.items()}
    # With a kernel made already, vLLM takes a call for a reload and leaves out the experts' own packing.
    if twin is not method and "moe_kernel" in vars(twin):
        vars(twin)["moe_kernel"] = None
    return shadow


class _Copies:
    """Copies of what a layer holds, each made once."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def know(self, value: Any, made: Any) -> None:
        self._made[id(value)] = made

    def of(self, value: Any, depth: int) -> Any:
        """The copy of a value, or the value itself where it is shared."""
        if id(value) in self._made:
            return self._made[id(value)]
        if depth == 0 or is_native(value) or hasattr(type(value), "__del__"):
            return value
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if type(value) in _DICTS or type(value) is list:
            return self._of_container(value, depth)
        if type(value) is set:
            return set(value)
        if isinstance(value, tuple):
            return self._of_tuple(value, depth)
        if isinstance(value, MethodType):
            owner = self.of(value.__self__, depth - 1)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        return self._of_object(value, depth) if is_walked(value) else value

    def of_module(self, value: nn.Module) -> nn.Module:
        """The copy of a quantisation method that is a module. Its child modules are shared."""
        twin: nn.Module = value.__class__.__new__(value.__class__)
        self.know(value, twin)
        tables = {name: {k: self.of(v, 1) for k, v in value.__dict__[name].items()} for name in TABLES}
        twin.__dict__.update((name, self.of(v, _DEPTH)) for name, v in value.__dict__.items() if name not in TABLES)
        twin.__dict__.update(tables)
        return twin

    def _of_tensor(self, value: Tensor) -> Tensor:
        if value.is_meta or value.layout is not torch.strided:
            return value
        made = value.detach().clone(memory_format=torch.preserve_format)
        made.__class__ = type(value)
        made.__dict__ = dict(value.__dict__)
        self.know(value, made)
        return made

    def _of_container(self, value: Any, depth: int) -> Any:
        made = copy.copy(value)
        self.know(value, made)
        for key in list(made) if isinstance(made, dict) else range(len(made)):
            made[key] = self.of(made[key], depth - 1)
        return made

    def _of_tuple(self, value: tuple[Any, ...], depth: int) -> tuple[Any, ...]:
        inner = [self.of(item, depth - 1) for item in value]
        if all(a is b for a, b in zip(inner, value, strict=True)):
            return value
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)

    def _of_object(self, value: Any, depth: int) -> Any:
        try:
            made = copy.copy(value)
        except Exception:  # it does not allow copies: post-processing that changes it is found by the self-test
            return value
        if made is value:
            return value
        self.know(value, made)
        for name, inner in attributes(value).items():
            copied = self.of(inner, depth - 1)
            if name in getattr(made, "__dict__", ()):
                made.__dict__[name] = copied
            elif copied is not inner:
                object.__setattr__(made, name, copied)  # a slot, also of a frozen dataclass
        return made


def snapshot(layer: nn.Module) -> Callable[[], None]:
    """A function that gives a layer, its method, its kernels and their containers the attributes that they have now."""
    undo = [_undo(value.__dict__) for value in _owners(layer)]
    undo += [_undo(value) for _, value in reached(layer) if type(value) in (*_DICTS, list, set)]

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _owners(layer: nn.Module) -> Iterator[Any]:
    yield layer
    for _, value in reached(layer):
        if (is_walked(value) or isinstance(value, nn.Module)) and hasattr(value, "__dict__"):
            yield value


def _undo(container: Any) -> Callable[[], None]:
    before = copy.copy(container)

    def undo() -> None:
        container.clear()
        container.extend(before) if isinstance(container, list) else container.update(before)

    return undo


def post_process(layer: nn.Module) -> None:
    """Run the engine's own post-processing of a layer's weights, as after loading a checkpoint."""
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    update: Any = getattr(layer, "update_param_tp_status", None)
    if update is not None:
        update()


def post_process_attention(layer: nn.Module, act_dtype: torch.dtype) -> None:
    """Run the engine's own post-processing of an attention layer, which reads other layers' weights."""
    process: Any = layer.process_weights_after_loading
    process(act_dtype)
