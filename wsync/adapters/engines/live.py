"""The engine's live memory: which pieces of it are written, and which piece an address belongs to."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from wsync.errors import ConfigError, DtypeMismatchError, StateError
from wsync.plan.program import StorageMemory
from wsync.spec.dtypes import ITEMSIZE


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
        self._addresses = [(name, t, t.data_ptr()) for name, t in self.tensors.items()]
        self._owned = {t.untyped_storage().data_ptr(): name for name, t in self.tensors.items() if t.numel()}

    def memory(self) -> list[StorageMemory]:
        """Where each storage lies."""
        return [StorageMemory(s.address, s.num_elements, _dtype_name(s.dtype)) for s in self.storages]

    def owner(self, tensor: torch.Tensor) -> str | None:
        """The name of a live tensor whose memory ``tensor`` is a view of, or None."""
        owned = self._owned.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        place = self.place(tensor) if owned is not None else None
        return owned if place is None else self.storages[place.storage_idx].names[0]

    def place(self, tensor: torch.Tensor) -> LivePlace | None:
        """Where a view lies, or None where it reaches outside of every live tensor."""
        below = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if below < 0:
            return None
        storage_idx = self._index_at[below]
        storage = self.storages[storage_idx]
        offset, misaligned = divmod(tensor.data_ptr() - storage.address, storage.dtype.itemsize)
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        same_size = tensor.element_size() == storage.dtype.itemsize
        if misaligned or not same_size or offset + reach > storage.num_elements:
            return None
        return LivePlace(storage_idx, offset)

    def check_addresses(self) -> None:
        """Check that every live tensor is still where it was.

        Raises:
            StateError: one was moved or freed; the message names it.
        """
        for name, tensor, address in self._addresses:
            now = tensor.data_ptr()
            if now != address:
                raise StateError(
                    f"the engine's {name!r} was at address {address:#x} when it was recorded and is at {now:#x} now",
                    hint="create the Sink again; captured graphs and recorded copies both hold the old address",
                )


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
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    if tensor.numel() > 1 and any(s == 0 < n - 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ConfigError(
            f"the engine's {name!r} of shape {tuple(tensor.shape)} and strides {tensor.stride()} overlaps itself"
        )
    return LiveStorage([name], tensor.dtype, tensor.data_ptr(), reach, tensor.numel(), isinstance(tensor, nn.Parameter))


def _join(storage: LiveStorage, span: LiveStorage) -> None:
    """Add a tensor that shares memory with those of a storage."""
    if span.dtype != storage.dtype:
        names = f"{storage.names[0]!r} and {span.names[0]!r}"
        raise DtypeMismatchError(f"the engine's {names} share memory, but are {storage.dtype} and {span.dtype}")
    end = max(storage.end, span.end)
    # Which elements partly overlapping tensors address together is not worked out: then it counts as gapless.
    grown = end > storage.end
    storage.total = (end - storage.address) // span.dtype.itemsize if grown else max(storage.total, span.total)
    storage.num_elements = (end - storage.address) // span.dtype.itemsize
    storage.names.extend(span.names)
    storage.is_parameter |= span.is_parameter
