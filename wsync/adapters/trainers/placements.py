"""The boxes of one rank's part of a tensor, and where each lies in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from wsync.describe.intervals import Interval, Split, local_intervals
from wsync.errors import ConfigError, ManifestError
from wsync.plan.program import ShardMemory
from wsync.spec.box import Box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without importing torch.distributed where it is not available."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that holds this rank's memory: the local tensor of a DTensor, else the tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def held_memory(name: str, tensor: torch.Tensor) -> list[ShardMemory]:
    """The boxes of ``tensor`` that this rank holds, each with its address and strides; empty boxes are left out.

    Raises:
        ConfigError: a ``Partial`` placement, or one that is unknown.
        ManifestError: the local tensor has another shape than its placements say.
    """
    local = local_of(tensor)
    intervals = _dtensor_intervals(name, tensor) if is_dtensor(tensor) else [((0, n),) for n in tensor.shape]
    if intervals is None:
        return []
    expected = tuple(sum(stop - start for start, stop in held) for held in intervals)
    if local.numel() == 0 and 0 in expected:
        return []
    if expected != tuple(local.shape):
        raise ManifestError(
            f"{name!r} holds a local tensor of shape {tuple(local.shape)}, but its placements say {expected}"
        )
    return [_shard_memory(local, boxed) for boxed in itertools.product(*[_with_positions(held) for held in intervals])]


def _with_positions(held: Sequence[Interval]) -> list[tuple[int, int, int]]:
    """(global start, extent, local position) of every interval."""
    position = 0
    found = []
    for start, stop in held:
        found.append((start, stop - start, position))
        position += stop - start
    return found


def _shard_memory(local: torch.Tensor, boxed: Sequence[tuple[int, int, int]]) -> ShardMemory:
    strides = tuple(local.stride())
    element = sum(position * stride for (_, _, position), stride in zip(boxed, strides, strict=True))
    box = Box(tuple(start for start, _, _ in boxed), tuple(extent for _, extent, _ in boxed))
    return ShardMemory(address=local.data_ptr() + element * local.element_size(), strides=strides, box=box)


def _dtensor_intervals(name: str, tensor: Any) -> list[tuple[Interval, ...]] | None:
    """For each dimension the intervals that this rank holds; None where it is not part of the mesh."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    placements = tensor.placements
    by_dim: dict[int, list[int]] = {}
    for axis, placement in enumerate(placements):
        dim = _sharded_dim(name, placement, tensor.dim())
        if dim is not None:
            by_dim.setdefault(dim, []).append(axis)
    if coordinate is None:
        return None
    intervals = []
    for dim, extent in enumerate(tensor.shape):
        axes = by_dim.get(dim, [])
        splits = [Split(coordinate[a], mesh.size(a), int(getattr(placements[a], "split_factor", 1))) for a in axes]
        intervals.append(local_intervals(int(extent), splits, _stated_order(tensor, dim, axes)))
    return intervals


def _sharded_dim(name: str, placement: Any, num_dims: int) -> int | None:
    """The dimension that a placement shards, or None for ``Replicate``."""
    if placement.is_partial():
        raise ConfigError(
            f"{name!r} has the placement {placement!r}: its values are sums that no rank holds yet",
            hint="redistribute it to Shard or Replicate before publishing",
        )
    if placement.is_replicate():
        return None
    dim = getattr(placement, "dim", None)
    if dim is None:
        raise ConfigError(
            f"{name!r} has the placement {placement!r}, which is neither Shard, _StridedShard nor Replicate"
        )
    return int(dim) % num_dims


def _stated_order(tensor: DTensor, dim: int, axes: list[int]) -> list[int] | None:
    """The order of sharding that newer versions of torch state beside the placements, as positions in ``axes``."""
    spec = tensor._spec
    if getattr(spec, "use_strided_shard_as_shard_order", True):
        return None
    for entry in getattr(spec, "shard_order", None) or ():
        if entry.tensor_dim == dim and sorted(entry.mesh_dims) == axes:
            return [axes.index(a) for a in entry.mesh_dims]
    return None
