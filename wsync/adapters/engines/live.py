"""The engine's live memory: which pieces of it are written, and which piece an address belongs to."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from wsync.errors import ConfigError, DtypeMismatchError, StateError
from wsync.plan.program import StorageMemory
from wsync.spec.dtypes import ITEMSIZE

_AGAIN = "create the Sink again; captured graphs and recorded copies both hold the old address"


class Placed(NamedTuple):
    """Where a tensor lies and how."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Placed:
        """Of a tensor as it is now."""
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def __str__(self) -> str:
        return f"at address {self.address:#x} ({_dtype_name(self.dtype)} of shape {self.shape}, strides {self.strides})"


class LivePlace(NamedTuple):
    """Where a view of live memory begins.

    Attributes:
        storage_idx: into `LiveMemory.storages`.
        offset: elements from the storage's first one.
    """

    storage_idx: int
    offset: int


@dataclass
class LiveStorage:
    """One piece of live memory that no other piece overlaps: a parameter or buffer, with those that share its memory.

    Attributes:
        names: of the tensors in it, in the engine's order.
        dtype: of all of them.
        address: of its first element.
        num_elements: up to the end of the last tensor.
        total: elements that its tensors address; fewer than ``num_elements`` where they leave gaps.
        is_parameter: one of them is a parameter (a buffer may stay as it is).
    """

    names: list[str]
    dtype: torch.dtype
    address: int
    num_elements: int
    total: int
    is_parameter: bool

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.num_elements * self.dtype.itemsize


class LiveMemory:
    """The live parameters and buffers of one engine rank.

    Args:
        tensors: by the engine's own names.

    Raises:
        ConfigError: a tensor that is not plain memory of the CPU.
        DtypeMismatchError: a dtype that wsync does not move, or two dtypes in one memory.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        spans = [_span(name, tensor) for name, tensor in self.tensors.items()]
        by_address: list[LiveStorage] = []
        for span in sorted((s for s in spans if s.num_elements), key=lambda s: s.address):
            if by_address and span.address < by_address[-1].end:
                _join(by_address[-1], span)
            else:
                by_address.append(span)
        position = {name: i for i, name in enumerate(self.tensors)}
        for storage in by_address:
            storage.names.sort(key=position.__getitem__)
        self._starts = [s.address for s in by_address]
        # In the engine's own order, so that a recording does not depend on where the allocator put things.
        self.storages = sorted(by_address, key=lambda s: position[s.names[0]])
        indices = {id(s): i for i, s in enumerate(self.storages)}
        self._index_at = [indices[id(s)] for s in by_address]
        self._places = {name: Placed.of(tensor) for name, tensor in self.tensors.items()}
        for storage in self.storages:
            storage.total = self._addressed(storage)
        self._flat = [self._view_of(storage) for storage in self.storages]
        self._owned = {t.untyped_storage().data_ptr(): name for name, t in self.tensors.items() if t.numel()}

    def memory(self) -> list[StorageMemory]:
        """Where each storage lies."""
        return [StorageMemory(s.address, s.num_elements, _dtype_name(s.dtype)) for s in self.storages]

    def flat(self, storage_idx: int) -> torch.Tensor:
        """The memory of a storage as a flat tensor `[num_elements]` of its dtype."""
        return self._flat[storage_idx]

    def owner(self, tensor: torch.Tensor) -> str | None:
        """The name of a live tensor whose memory ``tensor`` overlaps, or None."""
        if not tensor.numel() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            return None
        start = tensor.data_ptr()
        end = start + _reach(tensor) * tensor.element_size()
        # By address: one allocation may be known to torch as several storages.
        below = bisect.bisect_right(self._starts, start) - 1
        for position in (below, below + 1):
            if 0 <= position < len(self._starts):
                storage = self.storages[self._index_at[position]]
                if storage.address < end and start < storage.end:
                    return storage.names[0]
        return None

    def neighbour(self, tensor: torch.Tensor) -> str | None:
        """The name of a live tensor in the same allocation, or None."""
        return self._owned.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None

    def shape_of(self, storage: LiveStorage) -> tuple[int, ...]:
        """The shape of a tensor that is the whole storage, or the storage as a flat one."""
        for name in storage.names:
            tensor = self.tensors[name]
            if tensor.numel() == storage.num_elements and tensor.is_contiguous():
                return tuple(tensor.shape)
        return (storage.num_elements,)

    def matrix_at(self, storage: LiveStorage, element: int) -> tuple[str, tuple[int, ...]]:
        """The smallest live tensor of two or more dimensions that has an element, and the number of its matrix."""
        best: tuple[str, torch.Tensor, int] | None = None
        for name in storage.names:
            tensor = self.tensors[name]
            at = element - (tensor.data_ptr() - storage.address) // tensor.element_size()
            has = tensor.dim() > 1 and 0 <= at < _reach(tensor)
            if has and (best is None or tensor.numel() < best[1].numel()):
                best = (name, tensor, at)
        if best is None:
            return "", ()
        name, tensor, at = best
        number: dict[int, int] = {}
        batch = [dim for dim in range(tensor.dim() - 2) if tensor.shape[dim] > 1]
        strides = tensor.stride()
        for dim in sorted(batch, key=lambda d: strides[d], reverse=True):
            number[dim], at = divmod(at, strides[dim])
        return name, tuple(number.get(dim, 0) for dim in range(tensor.dim() - 2))

    def place(self, tensor: torch.Tensor) -> LivePlace | None:
        """Where a view lies, or None where it reaches outside of every live tensor."""
        below = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if below < 0:
            return None
        storage_idx = self._index_at[below]
        storage = self.storages[storage_idx]
        offset, misaligned = divmod(tensor.data_ptr() - storage.address, storage.dtype.itemsize)
        same_size = tensor.element_size() == storage.dtype.itemsize
        if misaligned or not same_size or offset + _reach(tensor) > storage.num_elements:
            return None
        return LivePlace(storage_idx, offset)

    def check_addresses(self, current: Mapping[str, torch.Tensor] | None = None) -> None:
        """Check that every live tensor is still where it was, and what it was.

        Args:
            current: the engine's live tensors by name as they are now. Without it only the tensors that were recorded
                are looked at, and one that the engine has since replaced by another is not noticed.

        Raises:
            StateError: one was moved, freed, replaced, added or removed; the message names it and both values.
        """
        tensors = self.tensors if current is None else current
        if tensors.keys() != self._places.keys():
            raise StateError(
                f"{len(self._places)} live tensors of the engine were recorded and it has {len(tensors)} now: new are "
                f"{_listed(set(tensors) - set(self._places))}, gone are {_listed(set(self._places) - set(tensors))}",
                hint=_AGAIN,
            )
        for name, placed in self._places.items():
            now = Placed.of(tensors[name])
            if now != placed:
                raise StateError(
                    f"the engine's {name!r} was {placed} when it was recorded and is {now} now", hint=_AGAIN
                )

    def _view_of(self, storage: LiveStorage) -> torch.Tensor:
        # Of a tensor whose allocation reaches over the whole storage; made once, as tensors may be moved later.
        tensors = [self.tensors[name].detach() for name in storage.names]
        tensor = max(tensors, key=lambda t: t.untyped_storage().data_ptr() + t.untyped_storage().nbytes())
        offset = (storage.address - tensor.untyped_storage().data_ptr()) // tensor.element_size()
        return tensor.as_strided((storage.num_elements,), (1,), offset)

    def _addressed(self, storage: LiveStorage) -> int:
        """Elements of a storage that belong to one of its tensors."""
        tensors = [self.tensors[name] for name in storage.names]
        if any(_is_whole(t, storage) for t in tensors):
            return storage.num_elements
        if len({self._places[name] for name in storage.names}) == 1:
            return tensors[0].numel()
        belongs = np.zeros(storage.num_elements, dtype=np.bool_)
        for t in tensors:
            offset = (t.data_ptr() - storage.address) // t.element_size()
            np.lib.stride_tricks.as_strided(belongs[offset:], t.shape, t.stride())[...] = True
        return int(np.count_nonzero(belongs))


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(map(repr, found[:3])) + more if found else "none"


def _reach(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first one up to the end of its last one."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def _is_whole(tensor: torch.Tensor, storage: LiveStorage) -> bool:
    return tensor.numel() == storage.num_elements and _reach(tensor) == storage.num_elements


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _span(name: str, tensor: torch.Tensor) -> LiveStorage:
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"the engine's {name!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise ConfigError(
            f"the engine's {name!r} is {tensor.layout} on {tensor.device}; only strided tensors of the CPU are written"
        )
    dtype = _dtype_name(tensor.dtype)
    if dtype not in ITEMSIZE:
        raise DtypeMismatchError(f"the engine's {name!r} is {dtype}, which is not one of the dtypes that wsync moves")
    if tensor.numel() > 1 and any(s == 0 < n - 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ConfigError(
            f"the engine's {name!r} of shape {tuple(tensor.shape)} and strides {tensor.stride()} overlaps itself"
        )
    return LiveStorage(
        [name], tensor.dtype, tensor.data_ptr(), _reach(tensor), tensor.numel(), isinstance(tensor, nn.Parameter)
    )


def _join(storage: LiveStorage, span: LiveStorage) -> None:
    """Add a tensor that shares memory with those of a storage."""
    if span.dtype != storage.dtype:
        names = f"{storage.names[0]!r} and {span.names[0]!r}"
        raise DtypeMismatchError(f"the engine's {names} share memory, but are {storage.dtype} and {span.dtype}")
    end = max(storage.end, span.end)
    storage.num_elements = (end - storage.address) // span.dtype.itemsize
    storage.names.extend(span.names)
    storage.is_parameter |= span.is_parameter
