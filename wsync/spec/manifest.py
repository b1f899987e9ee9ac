"""Manifests: the complete typed description of one side's tensors and boxes. No addresses, no torch."""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from wsync.errors import ManifestError, ShapeMismatchError
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize

PARAMETER = "parameter"
BUFFER = "buffer"
"""The kinds of a tensor."""

Memory = Literal["device", "host"]
DEVICE: Final = "device"
HOST: Final = "host"
"""Where a rank that runs on a GPU keeps what is synced: in the GPU's memory, or in that of its node."""

MAX_DIMS = 32
"""Dimensions that a tensor may have."""
MAX_TENSOR_BYTES = 1 << 62
"""Bytes that a tensor may have, so that every offset and stride in it fits 64 bits with a sign."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the trainer's model, by its checkpoint name.

    Attributes:
        name: checkpoint name.
        shape: global shape in elements.
        dtype: torch name of what the trainer holds (``float32`` for f32 masters).
        kind: `PARAMETER` or `BUFFER`. Parameters must be finite.
        frozen: the trainer does not change it.
        alias_of: name of the tensor whose memory this one shares (tied weights), or None. Sent once, under that name.
        recipe: what an engine gets that declares none for it; None leaves that to the engine's side.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = PARAMETER
    frozen: bool = False
    alias_of: str | None = None
    recipe: str | None = None


class RankInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where one rank runs.

    Attributes:
        host: identity of the machine (two ranks with equal ``host`` can share memory).
        pid: its process.
        pid_namespace: in which ``pid`` counts (containers of one host may have their own).
        gpu: index of its GPU on the machine, as in the cluster file. None leaves it to the planner: it takes trainer
            and engine ranks of one machine to run on different GPUs if there are enough, numbered in order, trainer
            ranks first; if not, both sides to share GPUs, each numbered from 0.
        memory: where a trainer rank has its weights, or an engine rank what it receives until it installs that:
            `DEVICE`, or `HOST`, from which every byte crosses PCIe to the rank's GPU. On a machine without GPUs it says
            nothing.
    """

    host: str
    pid: int = 0
    pid_namespace: str = ""
    gpu: int | None = None
    memory: Memory = DEVICE


class SourceRankManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one trainer rank holds.

    Attributes:
        rank, world_size: as in torch.distributed.
        info: where it runs.
        tensors: every tensor of the model, the same tuple on every rank, in one order.
        shards: for each tensor (same order) the boxes that this rank holds; aliases hold none.
    """

    rank: int
    world_size: int
    info: RankInfo
    tensors: tuple[TensorSpec, ...]
    shards: tuple[tuple[Box, ...], ...]


class SourceManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all trainer ranks hold.

    Attributes:
        ranks: where each rank runs.
        tensors: every tensor of the model.
        shards: ``shards[tensor_idx][rank]`` are the boxes of that tensor on that rank.
    """

    ranks: tuple[RankInfo, ...]
    tensors: tuple[TensorSpec, ...]
    shards: tuple[tuple[tuple[Box, ...], ...], ...]


class StorageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of live engine memory that copies write into: a parameter or buffer.

    Attributes:
        name: the engine's own name.
        dtype: torch name.
        num_elements: elements of the underlying storage that a copy may address.
    """

    name: str
    dtype: str
    num_elements: int


class CopySpec(msgspec.Struct, frozen=True, array_like=True):
    """One recorded copy: a box of a recipe's part goes to strided engine memory.

    Attributes:
        tensor: checkpoint name of the tensor, as in the source's name table.
        role: which part of the tensor's recipe: ``"weight"``, ``"scale"``, or ``"scale_2"`` of a second level.
        box: in the part's own coordinates.
        storage_idx: index into `SinkRankManifest.storages`.
        dst_offset: element of the storage that the box's first element goes to.
        dst_strides: elements, one for each dimension of the box.
    """

    tensor: str
    role: str
    box: Box
    storage_idx: int
    dst_offset: int
    dst_strides: tuple[int, ...]


class SinkRankManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one engine rank needs, and where it goes.

    Attributes:
        replica: name of the replica.
        rank, world_size: within the replica.
        info: where it runs.
        recipes: checkpoint name -> recipe, for every tensor that this rank takes.
        storages: the live memory that is written.
        copies: every recorded copy.
        scale_groups: checkpoint names of tensors that share an amax (those that the engine fuses under one scale of the
            whole tensor), each in at most one group. Names that this rank does not take may be among them.
    """

    replica: str
    rank: int
    world_size: int
    info: RankInfo
    recipes: dict[str, str]
    storages: tuple[StorageSpec, ...]
    copies: tuple[CopySpec, ...]
    scale_groups: tuple[tuple[str, ...], ...] = ()


class SinkManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all engine ranks of all replicas need. The order is that of the plan's sink indices."""

    ranks: tuple[SinkRankManifest, ...]


def merge_source(parts: list[SourceRankManifest]) -> SourceManifest:
    """Join the ranks' manifests, in order of rank.

    Raises:
        ManifestError: ranks are missing or twice, or describe different tensors (the first difference is named), or a
            rank's shards are not those of its tensors.
    """
    if not parts:
        raise ManifestError("a source needs at least one rank, got 0")
    by_rank = sorted(parts, key=lambda p: p.rank)
    world_size = by_rank[0].world_size
    ranks = [p.rank for p in by_rank]
    if len(ranks) != world_size or ranks != list(range(len(ranks))):
        raise ManifestError(f"a source of world size {world_size} needs ranks 0 to {world_size - 1}, got {ranks}")
    first = by_rank[0]
    for tensor in first.tensors:
        check_tensor(tensor)
    for part in by_rank[1:]:
        if part.world_size != world_size:
            raise ManifestError(f"rank 0 says world size {world_size}, rank {part.rank} says {part.world_size}")
        if part.tensors != first.tensors:
            raise ManifestError(_first_difference(first, part))
    for part in by_rank:
        _check_shards(part)
    shards = tuple(tuple(p.shards[i] for p in by_rank) for i in range(len(first.tensors)))
    return SourceManifest(tuple(p.info for p in by_rank), first.tensors, shards)


def _check_shards(part: SourceRankManifest) -> None:
    if len(part.shards) != len(part.tensors):
        raise ManifestError(f"rank {part.rank} lists {len(part.tensors)} tensors, but shards of {len(part.shards)}")
    checked: set[tuple[tuple[int, ...], tuple[Box, ...]]] = set()
    for tensor, boxes in zip(part.tensors, part.shards, strict=True):
        if (tensor.shape, boxes) not in checked:
            check_shards(tensor, part.rank, boxes)
            checked.add((tensor.shape, boxes))


def check_tensor(tensor: TensorSpec) -> None:
    """Refuse a tensor that cannot be.

    Raises:
        ManifestError: too many dimensions, a negative or huge size, or an unknown kind.
        DtypeMismatchError: a dtype that wsync does not move.
    """
    if len(tensor.shape) > MAX_DIMS:
        raise ManifestError(f"tensor {tensor.name!r} has {len(tensor.shape)} dimensions, allowed are {MAX_DIMS}")
    if any(n < 0 for n in tensor.shape):
        raise ManifestError(f"tensor {tensor.name!r} has shape {tensor.shape}, allowed are sizes from 0")
    nbytes = itemsize(tensor.dtype) * math.prod(tensor.shape)
    if nbytes > MAX_TENSOR_BYTES:
        raise ManifestError(f"tensor {tensor.name!r} has {nbytes} bytes, allowed are {MAX_TENSOR_BYTES}")
    if tensor.kind not in (PARAMETER, BUFFER):
        raise ManifestError(f"tensor {tensor.name!r} is of kind {tensor.kind!r}, allowed are {PARAMETER} and {BUFFER}")


def check_shards(tensor: TensorSpec, rank: int, boxes: tuple[Box, ...]) -> None:
    """Refuse boxes that are not inside their tensor.

    Raises:
        ShapeMismatchError: a box of another number of dimensions, or one that is negative or reaches outside.
    """
    for box in boxes:
        if len(box.shape) != len(tensor.shape) or len(box.offset) != len(tensor.shape):
            raise ShapeMismatchError(
                f"shard of {tensor.name!r} on trainer rank {rank} has {len(box.shape)} dimensions (offset "
                f"{box.offset}, shape {box.shape}), the tensor's shape is {tensor.shape}"
            )
        for offset, extent, limit in zip(box.offset, box.shape, tensor.shape, strict=True):
            if offset < 0 or extent < 0 or offset + extent > limit:
                raise ShapeMismatchError(
                    f"shard of {tensor.name!r} on trainer rank {rank} (offset {box.offset}, shape {box.shape}) is not "
                    f"inside the tensor's shape {tensor.shape}"
                )


def _first_difference(a: SourceRankManifest, b: SourceRankManifest) -> str:
    for x, y in zip(a.tensors, b.tensors, strict=False):
        if x != y:
            return f"ranks describe different tensors: rank {a.rank} has {x}, rank {b.rank} has {y}"
    return (
        f"ranks describe different numbers of tensors: rank {a.rank} has {len(a.tensors)}, "
        f"rank {b.rank} has {len(b.tensors)}"
    )
