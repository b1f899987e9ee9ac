"""Twins on the meta device: the shapes of what an operation returns, and stand-ins for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from wsync.adapters.engines.sources import Buffer
from wsync.adapters.engines.standins import StandIn, StridedView, write
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.errors import RecordError

aten = torch.ops.aten


def on_meta(memory: TrackedMemory, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on twins, for the shapes of what it returns.

    Raises:
        RecordError: it needs values.
        RuntimeError: as torch does, where shapes or dtypes do not fit.
    """

    def twin(t: Any) -> Any:
        if isinstance(t, StandIn):
            return t.twin
        if isinstance(t, torch.Tensor) and not t.is_meta:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        return t

    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    meta_kwargs = {k: (torch.device("meta") if k == "device" else v) for k, v in tree_map(twin, dict(kwargs)).items()}
    meta_kwargs.pop("pin_memory", None)
    if func.overloadpacket is aten._pin_memory:
        func, args = aten.clone.default, args[:1]
    try:
        return func(*tree_map(twin, tuple(args)), **meta_kwargs)
    except NotImplementedError as e:
        raise RecordError(f"the loader uses {func} on {memory.said(inputs)}, which needs its values") from e
    except RuntimeError as e:
        if "meta" in str(e) or "fake" in str(e).lower() or "data-dependent" in str(e):
            raise RecordError(f"the loader uses {func} on {memory.said(inputs)}, which needs its values") from e
        raise


def computed(memory: TrackedMemory, func: Any, twin: torch.Tensor, inputs: Iterable[torch.Tensor]) -> StandIn:
    """The result of an operation that is no copy; it remembers which one, and of what."""
    out = StandIn(Buffer(twin.shape, twin.dtype), torch.empty(twin.shape, dtype=twin.dtype, device="meta"))
    write(out.view_of_source, memory.computation(func, inputs))
    return out


def filled(memory: TrackedMemory, out: StandIn, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> StandIn:
    """A new buffer after copies into it: pairs of a view of its twin and what is copied there."""
    for twin, src in pairs:
        offset = int(twin.storage_offset())
        target = StridedView(out.source, offset, tuple(twin.shape), tuple(twin.stride()), twin.dtype)
        write(target, memory.view(src))
    return out


def piece(tensor: torch.Tensor, offset: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """A strided view of any tensor that a loader touches; ``offset`` counts elements from its first one."""
    if isinstance(tensor, StandIn):
        twin = tensor.twin
        return StandIn(tensor.source, twin.as_strided(shape, strides, int(twin.storage_offset()) + offset))
    return tensor.detach().as_strided(shape, strides, int(tensor.storage_offset()) + offset)
