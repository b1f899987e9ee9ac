"""The load view: the model as its loader knows it, over live memory where it may be written, over scratch elsewhere."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import NamedTuple

import torch
from torch import nn

from wsync.adapters.engines.live import Placed
from wsync.adapters.engines.vllm.probing import Effect, Run, StaleKernelError, probe
from wsync.adapters.engines.vllm.reach import is_constant, is_native, reached
from wsync.adapters.engines.vllm.reloading import (
    is_attention,
    is_post_processed,
    is_recorded,
    load_time_tensors,
    over,
    registered,
)
from wsync.adapters.engines.vllm.repacking import LayerReload, LayerRepack, hold, put_back
from wsync.adapters.engines.vllm.shadow import post_process
from wsync.errors import RecordError, StateError

Tensor = torch.Tensor

_LOG = logging.getLogger(__name__)


@dataclass
class _Layer:
    name: str
    module: nn.Module
    at_load: dict[str, Tensor]
    repack: LayerRepack | None = None
    released: dict[str, Tensor] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)


class Sample(NamedTuple):
    """A post-processed layer that stands for all of its kind.

    Attributes:
        name: of the layer.
        repack: of it, or None where its weights stay as they are loaded.
        tensors: full names of its tensors at load.
    """

    name: str
    repack: LayerRepack | None
    tensors: tuple[str, ...]


@dataclass
class LoadView:
    """What a recording is made on.

    Attributes:
        tensors: by full name: the live tensor where it may be written, scratch memory elsewhere.
        repacks: each with the full names of its scratch tensors, by attribute name.
        derived: attention layers whose live tensors are computed from other layers' weights.
        samples: one post-processed layer of each kind.
        buffers: full names of those that the trainer fills. The engine may replace others (rotary caches).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    repacks: list[tuple[LayerRepack, dict[str, str]]] = field(default_factory=list)
    derived: list[nn.Module] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    buffers: frozenset[str] = frozenset()
    _layers: list[_Layer] = field(default_factory=list)

    def check(self) -> None:
        """Check that the engine still holds the tensors that a commit writes.

        Raises:
            StateError: it put another one in the place of one, or moved it.
        """
        for x in self._layers:
            if x.repack is not None:
                x.repack.check()
            held = registered(x.module)
            for key, before in x.placed.items():
                now = Placed.of(held[key]) if key in held else None
                if now != before and (key in x.module._parameters or _full(x.name, key) in self.buffers):
                    raise StateError(
                        f"the engine's {_full(x.name, key)!r} was {before} when it was recorded and is {now} now",
                        hint="create the Sink again; captured graphs and recorded copies both hold the old address",
                    )

    @contextmanager
    def with_released(self) -> Iterator[None]:
        """Layers whose weights the engine freed after use hold them inside, as they were filled last."""
        held = [(x.module, dict(x.module._parameters)) for x in self._layers if x.released]
        try:
            for x in self._layers:
                x.module._parameters.update(x.released)  # type: ignore[arg-type]
            yield
        finally:
            for module, parameters in held:
                put_back(module._parameters, parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model's modules hold the view's tensors inside, and what they held before afterwards."""
        before = [(x.module, dict(x.module._parameters), dict(x.module._buffers)) for x in self._layers]
        try:
            for x in self._layers:
                hold(x.module, x.at_load)
            yield
        finally:
            for module, parameters, buffers in before:
                put_back(module._parameters, parameters)
                put_back(module._buffers, buffers)


def build_load_view(model: nn.Module, run: Run = post_process, run_at_load: Run | None = None) -> LoadView:
    """Find out what post-processing does to each layer, and lay out the view accordingly. Changes nothing.

    Args:
        model: as it serves.
        run: post-processes a layer as in the background.
        run_at_load: does so as at loading; None where that is the same.

    Raises:
        RecordError: a layer whose post-processing cannot be followed.
    """
    _check_no_hook(model)
    kinds = _Kinds(run, run_at_load)
    layers = [_Found(name, layer, kinds.effect(name, layer)) for name, layer in model.named_modules()]
    view = LoadView()
    # First, as a tensor that a repacked layer shares with another layer is scratch memory for both.
    shared = _shared_scratch(layers)
    for found in layers:
        _add(view, found, shared, kinds)
    return view


def _check_no_hook(model: nn.Module) -> None:
    hook = getattr(type(model), "process_weights_after_loading", None)
    does_something = bool(hook.__code__.co_names) if isinstance(hook, FunctionType) else hook is not None
    if does_something and not is_attention(model):
        raise RecordError(
            f"{type(model).__name__} post-processes itself as a whole after loading, which cannot be followed",
            hint="vLLM's own reload leaves that out as well",
        )


class _Found(NamedTuple):
    name: str
    module: nn.Module
    effect: Effect | None
    """None: attention, or nothing that is loaded."""


class _Kinds:
    """Effects of post-processing by kinds of layers: layers of one kind are probed once."""

    def __init__(self, run: Run, run_at_load: Run | None) -> None:
        self.run = run
        self.run_at_load = run_at_load or run
        self._given = run_at_load
        self._effects: dict[object, Effect] = {}
        self.samples: set[str] = set()

    def effect(self, name: str, layer: nn.Module) -> Effect | None:
        """What post-processing does to a layer, or None where there is nothing to write in it."""
        live, at_load = registered(layer), load_time_tensors(layer)
        absent = any(t.is_meta for t in live.values())  # of another pipeline stage
        if absent or is_attention(layer) or not (at_load or live):
            return None
        if not is_post_processed(layer):
            return Effect(in_place=True)
        if not is_recorded(layer):
            raise RecordError(
                f"vLLM keeps no record of how {name!r} ({type(layer).__name__}) is loaded, and post-processes it",
                hint="it was made after the model was loaded, or by a loader of its own",
            )
        kind = (*_shapes(at_load), *_shapes(live), *_fingerprint(layer))
        if kind not in self._effects:
            self._effects[kind] = self._probed(name, layer)
            self.samples.add(name)
        return self._effects[kind]

    def _probed(self, name: str, layer: nn.Module) -> Effect:
        try:
            return probe(name, layer, self.run, self._given)
        except StaleKernelError:
            raise
        except RecordError as e:
            _LOG.warning("%s; such layers are loaded on the engine's thread at every commit", e.message)
            return Effect(in_place=False, slow=True)


def _shapes(tensors: dict[str, Tensor]) -> Iterator[tuple[object, ...]]:
    for key, t in tensors.items():
        yield key, tuple(t.shape), t.stride(), t.dtype


def _fingerprint(layer: nn.Module) -> Iterator[object]:
    """What tells kinds of layers apart beside their tensors: kernels and switches, not names, numbers or weights."""
    yield type(layer)
    for path, value in reached(layer):
        if isinstance(value, Tensor):
            yield path, tuple(value.shape), value.stride(), value.dtype
        elif isinstance(value, FunctionType):
            yield path, value.__code__
        elif isinstance(value, BuiltinFunctionType):
            yield path, value.__qualname__
        elif is_native(value) or not is_constant(value):
            yield path, type(value)
        elif isinstance(value, bool | torch.dtype | enum.Enum | type):
            yield path, value


@dataclass
class _Shared:
    """What layers share that hold one tensor (tied embeddings, a correction bias).

    Attributes:
        scratch: memory of a tensor that a repacked layer holds, by the place of the live tensor. Written to the live
            one by the repack, whichever layers hold it.
        written: the view's tensor of a live one that is written in place, by its `id`.
    """

    scratch: dict[Placed, Tensor] = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)


def _shared_scratch(layers: Sequence[_Found]) -> _Shared:
    shared = _Shared()
    holders: dict[Placed, tuple[str, bool]] = {}
    for name, layer, effect in layers:
        if effect is None or effect.in_place:
            continue
        live = registered(layer)
        for key, at_load in load_time_tensors(layer).items():
            if key not in live or not live[key].numel():
                continue
            place, stays = Placed.of(live[key]), effect.slow or key in effect.kept
            if place not in shared.scratch:
                shared.scratch[place] = _scratch(at_load, live[key])
            elif not (stays and holders[place][1]):
                raise RecordError(
                    f"{_full(name, key)!r} is {holders[place][0]!r}, too, and post-processing changes it in both layers"
                )
            holders[place] = (_full(name, key), stays)
    return shared


def _add(view: LoadView, found: _Found, shared: _Shared, kinds: _Kinds) -> None:
    name, layer, effect = found
    if effect is None:
        if is_attention(layer):
            _attention(view, name, layer)
        return
    at_load = load_time_tensors(layer)
    if effect.in_place:
        _in_place(view, name, layer, at_load, shared)
    else:
        _repacked(view, name, layer, at_load, effect, kinds, shared)
    if name in kinds.samples:
        repack = None if effect.in_place else view.repacks[-1][0]
        view.samples.append(Sample(name, repack, tuple(_full(name, key) for key in at_load)))


def _attention(view: LoadView, name: str, layer: nn.Module) -> None:
    at_load, live = load_time_tensors(layer), registered(layer)
    if live.keys() - at_load.keys() or derives(layer):
        view.derived.append(layer)
    kept = {key: live[key] for key, t in at_load.items() if key in live and _same_layout(live[key], t)}
    view._layers.append(_Layer(name, layer, kept, placed=_placed(kept)))
    view.tensors.update((_full(name, key), tensor) for key, tensor in kept.items())


def derives(layer: nn.Module) -> bool:
    """Whether the implementation of an attention layer makes something of its neighbours' weights for itself."""
    from vllm.v1.attention.backend import AttentionImplBase

    made_by = getattr(type(getattr(layer, "impl", None)), "process_weights_after_loading", None)
    return made_by is not None and made_by is not AttentionImplBase.process_weights_after_loading


def _in_place(view: LoadView, name: str, layer: nn.Module, at_load: dict[str, Tensor], shared: _Shared) -> None:
    live = registered(layer)
    tensors: dict[str, Tensor] = {}
    placed: dict[str, Tensor] = {}
    for key, remembered in at_load.items():
        memory = live.get(key)
        if memory is None or (memory.shape, memory.stride()) != (remembered.shape, remembered.stride()):
            raise RecordError(
                f"{_full(name, key)} is {_layout(remembered)} while it is loaded, the engine holds {_layout(memory)}, "
                f"and no post-processing of {type(layer).__name__} explains it"
            )
        if Placed.of(memory) in shared.scratch:
            tensors[key] = over(remembered, shared.scratch[Placed.of(memory)])
            continue
        if id(memory) not in shared.written:
            shared.written[id(memory)] = over(remembered, memory) if remembered.is_meta else memory
        tensors[key] = shared.written[id(memory)]
        placed[key] = memory
    view._layers.append(_Layer(name, layer, tensors, placed=_placed(placed)))
    view.tensors.update((_full(name, key), tensor) for key, tensor in tensors.items())


def _repacked(
    view: LoadView,
    name: str,
    layer: nn.Module,
    at_load: dict[str, Tensor],
    effect: Effect,
    kinds: _Kinds,
    shared: _Shared,
) -> None:
    live = registered(layer)
    scratch = {key: _scratch_of(t, live.get(key), shared) for key, t in at_load.items()}
    kind, run = (LayerReload, kinds.run_at_load) if effect.slow else (LayerRepack, kinds.run)
    repack = kind(name, layer, effect, at_load, scratch, run)
    tensors = {key: over(t, scratch[key]) for key, t in at_load.items()}
    released = {key: tensors[key] for key in effect.released}
    view._layers.append(_Layer(name, layer, tensors, repack, released))
    names = {key: _full(name, key) for key in tensors}
    view.tensors.update((names[key], tensor) for key, tensor in tensors.items())
    view.repacks.append((repack, names))


def _scratch_of(at_load: Tensor, live: Tensor | None, shared: _Shared) -> Tensor:
    if live is not None and live.numel():
        found = shared.scratch[Placed.of(live)]
        if found.shape == at_load.shape and found.dtype == at_load.dtype:
            return found
    return _scratch(at_load, live)


def _scratch(at_load: Tensor, live: Tensor | None) -> Tensor:
    memory = torch.empty_strided(at_load.shape, at_load.stride(), dtype=at_load.dtype)
    if live is not None and not isinstance(live, nn.Parameter) and live.shape == memory.shape:
        memory.copy_(live)  # a buffer that no checkpoint fills
    return memory


def _placed(tensors: dict[str, Tensor]) -> dict[str, Placed]:
    return {key: Placed.of(tensor) for key, tensor in tensors.items()}


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _layout(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"


def _full(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
