"""What a layer's kernels can reach: a walk over the layer's attributes, its quantisation method and its kernels.

A *leaf* is a tensor or a native matrix at the end of a path of attributes, items and closure cells. Child modules are
layers of their own and are left out; so is what belongs to the whole engine (configurations, process groups).
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from wsync.adapters.engines.vllm.reloading import registered

Tensor = torch.Tensor

Leaf = Any
"""A tensor, or an object that owns a native matrix and keeps its address in ``handler_tensor`` (oneDNN's)."""

DEPTH = 6
"""Steps from a layer to what is looked at."""

TABLES = ("_parameters", "_buffers", "_modules")

_CONSTANTS = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, enum.Enum, torch.dtype, torch.device)
_OF_THE_ENGINE = ("vllm.config", "vllm.distributed", "vllm.logger", "vllm.v1", "transformers.", "torch.")
_MEMORY = (torch.ScriptObject, torch.UntypedStorage, torch.TypedStorage)


class Reached(NamedTuple):
    """What the walk came to.

    Attributes:
        path: from the layer, such as ``.cpu_linear<handler>``.
        value: a leaf, a constant, an object that is walked further, or one that is not looked into.
    """

    path: str
    value: Any


def leaves(layer: nn.Module) -> dict[str, Leaf]:
    """Every tensor and native matrix that a layer's kernels may read, by its path. Registered ones have plain names."""
    found: dict[str, Leaf] = dict(registered(layer))
    found.update((path, value) for path, value in reached(layer) if isinstance(value, Tensor) or is_native(value))
    return found


def is_native(value: Any) -> bool:
    """Whether a value owns a native matrix."""
    return not isinstance(value, Tensor | nn.Module | type) and isinstance(
        getattr(value, "handler_tensor", None), Tensor
    )


def is_opaque(value: Any) -> bool:
    """Whether a value may hold weights that cannot be seen: memory of native code, or an object without attributes."""
    if isinstance(value, _MEMORY):
        return True
    if isinstance(value, _CONSTANTS) or value is None or is_walked(value) or is_native(value):
        return False
    root = type(value).__module__.partition(".")[0]
    if root == "builtins":
        return type(value).__name__ in ("PyCapsule", "bytearray", "memoryview")
    return root in ("_ctypes", "ctypes", "array", "numpy") or (
        root not in sys.stdlib_module_names and root != "torch" and not hasattr(value, "__dict__")
    )


def is_constant(value: Any) -> bool:
    """Whether a value is a number, a name, a type or the like."""
    return isinstance(value, _CONSTANTS)


def is_walked(value: Any) -> bool:
    """Whether the walk goes on to the attributes of a value."""
    if isinstance(value, SimpleNamespace):
        return True
    module = type(value).__module__
    if module.startswith(_OF_THE_ENGINE) or module.partition(".")[0] in _NOT_WALKED:
        return False
    return not isinstance(value, nn.Module | FunctionType | MethodType) and (
        hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    )


_NOT_WALKED = frozenset(sys.stdlib_module_names - {"__main__"}) | {"numpy"}


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object that is walked, as they are now: another thread may add to them meanwhile."""
    found = dict(getattr(value, "__dict__", ()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.setdefault(name, getattr(value, name))
    return found


def reached(layer: nn.Module) -> Iterator[Reached]:
    """Everything that a layer reaches beside its registered tensors, each value once, by its shortest path."""
    seen = {id(t) for t in registered(layer).values()} | {id(layer)}
    found = deque((f".{name}", value, DEPTH) for name, value in dict(vars(layer)).items() if name not in TABLES)
    method = layer._modules.get("quant_method")
    if method is not None:
        seen.add(id(method))
        yield Reached(".quant_method", method)
        found.extend((f".quant_method{name}", value, DEPTH - 1) for name, value in _inside(method))
    while found:
        path, value, depth = found.popleft()
        if is_constant(value):
            yield Reached(path, value)
        elif id(value) not in seen and not isinstance(value, nn.Module):
            seen.add(id(value))
            yield Reached(path, value)
            if depth > 1 and not isinstance(value, Tensor) and not is_native(value):
                found.extend((f"{path}{name}", inner, depth - 1) for name, inner in _inside(value))


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", inner) for key, inner in list(value.items()))
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", inner) for i, inner in enumerate(list(value)))
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield from ((f".args[{i}]", inner) for i, inner in enumerate(value.args))
        yield from ((f".{key}", inner) for key, inner in value.keywords.items())
    elif isinstance(value, MethodType):
        yield ".__func__", value.__func__
        yield ".__self__", value.__self__
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f"<{name}>", _contents(cell)
        yield from ((f"<default {i}>", inner) for i, inner in enumerate(value.__defaults__ or ()))
        yield from ((f"<default {name}>", inner) for name, inner in (value.__kwdefaults__ or {}).items())
    elif isinstance(value, nn.Module) or is_walked(value):
        yield from ((f".{name}", inner) for name, inner in attributes(value).items())


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not bound yet
