"""What a trainer hands to `WsyncTrainer`: memory that is read in place, or vLLM's ``WeightSource``, which is iterated.

A ``WeightSource`` only says how to materialise tensors, one after the other. Those go into host memory of this side,
made once, and wsync publishes that memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from wsync.errors import (
    ConfigError,
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    StateError,
    WsyncError,
)
from wsync.integrations.vllm.together import gather_masks, ranks_meet


def read_in_place(source: Any) -> torch.nn.Module | Mapping[str, Any] | None:
    """The module or the tensors whose memory can be read as it is, or None for a source that has to be iterated.

    vLLM's own ``ModuleSource`` is nothing but a module, of which it would gather every tensor. A class derived from it
    may yield other tensors, and is iterated.
    """
    if isinstance(source, (torch.nn.Module, Mapping)):
        return source
    kind = type(source)
    if kind.__name__ == "ModuleSource" and kind.__module__.startswith("vllm."):
        module = getattr(source, "_module", None)
        return module if isinstance(module, torch.nn.Module) else None
    return None


class HostCopy:
    """Host memory for what a ``WeightSource`` yields. On every trainer rank.

    A source that every rank holds whole (``held_names()`` is None everywhere) is copied on rank 0 alone: on the other
    ranks its tensors mean nothing, and they only take part in its collectives. A source that is split over the ranks is
    copied where it is held, each tensor on one rank.

    Args:
        source: vLLM's ``WeightSource``: ``metadata()`` and iteration, in one order.
        rank, world_size: of the trainer.

    Raises:
        ConfigError: it is no such object, or it is split and torch.distributed does not connect these ranks.
        MissingTensorError: a tensor that no rank holds.

    Attributes:
        tensors: what this rank publishes, by name; None where only rank 0 publishes, and this is another.
        rank, world_size: of this rank as a publisher.
    """

    def __init__(self, source: Any, rank: int, world_size: int) -> None:
        if not callable(getattr(source, "metadata", None)) or not hasattr(source, "__iter__"):
            raise ConfigError(
                "source is a module, a mapping of tensors or vLLM's WeightSource (metadata() and iteration), got "
                f"{type(source).__name__}"
            )
        self._source = source
        self._metadata = list(source.metadata())
        self._trainer_rank = rank
        owners = self._owners(rank, world_size)
        is_split = any(owner != 0 for owner in owners)
        self.rank, self.world_size = (rank, world_size) if is_split else (0, 1)
        self._memory = {
            meta.name: torch.empty(meta.shape, dtype=meta.dtype)
            for meta, owner in zip(self._metadata, owners, strict=True)
            if owner == rank
        }
        self.tensors: dict[str, torch.Tensor] | None = None
        if is_split:
            self.tensors = self._split_tensors(owners)
        elif rank == 0:
            self.tensors = dict(self._memory)

    def fill(self) -> None:
        """Iterate the source, and keep what this rank publishes. A collective where the source makes it one.

        Raises:
            ConfigError: iteration yields other tensors than ``metadata()`` says; the first one is named.
        """
        num_seen = 0
        error: WsyncError | None = None
        for name, tensor in self._source:
            try:
                self._take(num_seen, name, tensor)
            except WsyncError as e:  # to the end all the same: other ranks iterate in lockstep with this one
                error = error or e
            num_seen += 1
        if error is not None:
            raise error
        if num_seen != len(self._metadata):
            raise ConfigError(f"the source yields {num_seen} tensors, its metadata() has {len(self._metadata)}")

    def _take(self, idx: int, name: str, tensor: Any) -> None:
        if idx >= len(self._metadata):
            raise ConfigError(f"the source yields {name!r} after the {len(self._metadata)} tensors of its metadata()")
        if name != self._metadata[idx].name:
            raise ConfigError(
                f"the source yields {name!r} at index {idx}, its metadata() has {self._metadata[idx].name!r}"
            )
        target = self._memory.get(name)
        if target is not None:
            _copy(name, tensor, target)

    def _owners(self, rank: int, world_size: int) -> list[int]:
        """The rank that publishes each tensor: of those that hold it, the one with the fewest bytes so far."""
        held = self._source.held_names() if callable(getattr(self._source, "held_names", None)) else None
        if not ranks_meet(rank, world_size):
            if held is not None and world_size > 1:
                raise ConfigError(
                    f"the source is split over {world_size} ranks (held_names() names {len(set(held))} of "
                    f"{len(self._metadata)} tensors on rank {rank}), and torch.distributed does not connect them",
                    hint="call torch.distributed.init_process_group with the trainer's ranks first",
                )
            if held is not None:
                self._check_held([set(held)])
            return [0] * len(self._metadata)
        names = None if held is None else set(held)
        masks = gather_masks(
            [names is not None, *(names is None or m.name in names for m in self._metadata)], world_size
        )
        if not any(mask[0] for mask in masks):
            return [0] * len(self._metadata)
        self._check_held(
            [{m.name for m, is_held in zip(self._metadata, mask[1:], strict=True) if is_held} for mask in masks]
        )
        num_bytes = [0] * world_size
        owners = []
        for idx, meta in enumerate(self._metadata):
            holders = [r for r, mask in enumerate(masks) if mask[idx + 1]]
            owner = min(holders, key=lambda r: (num_bytes[r], r))
            num_bytes[owner] += math.prod(meta.shape) * meta.dtype.itemsize
            owners.append(owner)
        return owners

    def _check_held(self, held: list[set[str]]) -> None:
        for meta in self._metadata:
            if not any(meta.name in names for names in held):
                raise MissingTensorError(f"tensor {meta.name!r} is held by none of the {len(held)} trainer ranks")

    def _split_tensors(self, owners: list[int]) -> dict[str, torch.Tensor]:
        """Tensors of which one rank holds all and the others nothing: replicated on a mesh of that one rank."""
        from torch.distributed.tensor import DTensor, Replicate

        meshes = {owner: _mesh_of(owner) for owner in sorted(set(owners))}
        tensors: dict[str, torch.Tensor] = {}
        for meta, owner in zip(self._metadata, owners, strict=True):
            local = self._memory.get(meta.name, torch.empty(0, dtype=meta.dtype))
            whole = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
            tensors[meta.name] = DTensor.from_local(
                local, meshes[owner], [Replicate()], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        return tensors


def _mesh_of(rank: int) -> Any:
    """A mesh of one rank; it says who holds a tensor, and never communicates."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", [rank], _init_backend=False)


def _copy(name: str, tensor: Any, target: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise StateError(f"the source yields {type(tensor).__name__} for {name!r}, which this rank holds")
    if tensor.dtype != target.dtype:
        raise DtypeMismatchError(f"the source yields {name!r} as {tensor.dtype}, its metadata() says {target.dtype}")
    if tensor.shape != target.shape:
        raise ShapeMismatchError(
            f"the source yields {name!r} with shape {tuple(tensor.shape)}, its metadata() says {tuple(target.shape)}"
        )
    target.copy_(tensor.detach())
