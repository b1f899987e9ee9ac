"""Describes what one trainer rank holds. Runs once for each model and sharding, and moves no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wsync.adapters.gpus import on_its_gpu
from wsync.adapters.trainers.declared import Declared, with_recipes
from wsync.adapters.trainers.named import NamedTensor, named_tensors, replaced_in
from wsync.adapters.trainers.placements import held_memory, is_dtensor, local_of
from wsync.errors import ConfigError, DtypeMismatchError, StateError
from wsync.plan.program import ShardMemory
from wsync.spec.box import Box
from wsync.spec.dtypes import ITEMSIZE
from wsync.spec.manifest import RankInfo, SourceRankManifest, TensorSpec


@dataclass(frozen=True)
class SourceDescription:
    """What one rank holds and where.

    Attributes:
        manifest: what it holds; the same tensors on every rank.
        memory: for each tensor of the manifest, in the same order, where each of its boxes lies. Strides in elements.
        keepalive: the tensors and arrays whose memory is used.
    """

    manifest: SourceRankManifest
    memory: list[list[ShardMemory]]
    keepalive: list[object]
    _watched: list[tuple[NamedTensor, int]] = field(repr=False)

    def check_addresses(self) -> None:
        """Check that every tensor is still where it was described. Costs about a microsecond for each tensor.

        Raises:
            StateError: a tensor was moved, freed or replaced; the message names it.
        """
        for entry, described in self._watched:
            now = local_of(entry.tensor).data_ptr()
            if now != described:
                what = (
                    f"moved from address {described:#x} to {now:#x}" if now else f"was freed (it was at {described:#x})"
                )
                raise StateError(f"{entry.name!r} {what} since it was described", hint="create the Source again")
            if entry.owner is not None and replaced_in(entry.owner, entry.key, entry.tensor):
                raise StateError(
                    f"{entry.name!r} was replaced in its module since it was described at address {described:#x}",
                    hint="create the Source again, and write parameters in place",
                )

    def write_counts(self) -> list[int]:
        """How often torch has seen each tensor written in place; 0 for what it does not count (arrays of others)."""
        return [_write_count(entry.tensor) for entry, _ in self._watched]

    def check_unwritten(self, before: list[int]) -> None:
        """Check that no tensor was written since `write_counts`. Writes behind torch's back are not seen.

        Raises:
            StateError: one was; the message names it.
        """
        for (entry, _), count in zip(self._watched, before, strict=True):
            now = _write_count(entry.tensor)
            if now != count:
                raise StateError(
                    f"{entry.name!r} was written {now - count} times while it was read for a publish",
                    hint="call Publication.wait_released() before the optimizer's next step",
                )


def _write_count(tensor: torch.Tensor) -> int:
    # An operation on a DTensor counts there, one on its local tensor on that; foreach and fused ones on neither.
    local = local_of(tensor)
    return sum(int(t._version) for t in {id(t): t for t in (tensor, local)}.values() if not t.is_inference())


def describe(
    model_or_tensors: nn.Module | Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    info: RankInfo,
    name_map: Callable[[str], str] | None = None,
    recipe: Declared | None = None,
) -> SourceDescription:
    """Describe this rank's part of a model.

    A DTensor's boxes follow from its placements and mesh coordinates. Any other tensor counts as whole: in a world of
    several ranks it is replicated. Of tensors that share one memory (tied weights) the first is described and the
    others are its aliases.

    Args:
        model_or_tensors: a module (its parameters and persistent buffers, named as in ``state_dict()``), or a mapping
            of names to torch tensors, DTensors, NumPy arrays or anything with ``__dlpack__``. Nothing is copied.
        rank, world_size: as in torch.distributed.
        info: where this rank runs; the GPU that it uses, if any, and where its weights are beside it are added.
        name_map: gives the checkpoint name for the model's own name.
        recipe: for engines that declare none, see `with_recipes`.

    Raises:
        RecipeError, UnknownTensorError: ``recipe`` does not fit the model.
        ConfigError: what cannot be read in place: other devices, partial placements, sparse tensors, subclasses.
        DtypeMismatchError: a dtype that wsync does not move.
        ManifestError: two tensors have one name, or a local tensor is not what its placements say.
        StateError: the module's FSDP parameters are gathered at the moment.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not inside a world of {world_size}")
    entries = named_tensors(model_or_tensors, name_map)
    specs: list[TensorSpec] = []
    memory: list[list[ShardMemory]] = []
    first_with: dict[object, str] = {}
    for entry in entries:
        dtype = _check_readable(entry)
        alias_of = first_with.setdefault(_memory_key(entry.tensor), entry.name)
        is_alias = alias_of != entry.name
        specs.append(
            TensorSpec(
                name=entry.name,
                shape=tuple(int(n) for n in entry.tensor.shape),
                dtype=dtype,
                kind=entry.kind,
                frozen=entry.frozen,
                alias_of=alias_of if is_alias else None,
            )
        )
        memory.append([] if is_alias else held_memory(entry.name, entry.tensor))
    shards: tuple[tuple[Box, ...], ...] = tuple(tuple(m.box for m in held) for held in memory)
    info = on_its_gpu(info, in_host=_is_in_host([local_of(e.tensor) for e in entries]))
    return SourceDescription(
        manifest=SourceRankManifest(rank, world_size, info, with_recipes(tuple(specs), recipe), shards),
        memory=memory,
        keepalive=[kept for e in entries for kept in (e.tensor, e.original) if kept is not None],
        _watched=[(e, local_of(e.tensor).data_ptr()) for e in entries],
    )


def _check_readable(entry: NamedTensor) -> str:
    """The dtype's name; refuses what has no plain memory of the CPU."""
    name, tensor = entry.name, local_of(entry.tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise DtypeMismatchError(
            f"{name!r} is {dtype}, which is not one of the dtypes that wsync moves ({', '.join(ITEMSIZE)})"
        )
    if tensor.layout is not torch.strided:
        raise ConfigError(f"{name!r} has the layout {tensor.layout}; only strided tensors are read")
    if tensor.device.type != "cpu":
        raise ConfigError(f"{name!r} is on {tensor.device}; only tensors of the CPU are read")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and hasattr(
        tensor, "__tensor_flatten__"
    ):
        raise ConfigError(f"{name!r} is a {type(tensor).__name__}, whose memory is spread over inner tensors")
    if tensor.is_neg():
        raise ConfigError(f"{name!r} is a lazily negated view; its memory holds other values than it shows")
    try:
        address = tensor.data_ptr()
    except RuntimeError as e:
        raise ConfigError(f"{name!r} is a {type(tensor).__name__} without memory of its own: {e}") from e
    if tensor.numel() and not address:
        raise StateError(f"{name!r} has shape {tuple(tensor.shape)} but its memory has been freed")
    return dtype


def _memory_key(tensor: torch.Tensor) -> object:
    """Equal for tensors that share one memory in one shape, on every rank alike (also where its shard is empty)."""
    local = local_of(tensor)
    storage = local.untyped_storage()
    # A storage without bytes has no address; the object tells it from other empty ones.
    where = storage.data_ptr() or ("empty", storage._cdata)
    placements = tuple(tensor.placements) if is_dtensor(tensor) else None  # type: ignore[attr-defined]
    shapes = (tuple(tensor.shape), tuple(local.shape), tuple(local.stride()))
    return (where, local.storage_offset(), shapes, local.dtype, placements)


def _is_in_host(tensors: list[torch.Tensor]) -> bool:
    """Whether most bytes are: a step counter or a table of frequencies on the CPU says nothing of the weights."""
    nbytes = [t.nbytes if t.device.type == "cpu" else -t.nbytes for t in tensors]
    return sum(nbytes) > 0
