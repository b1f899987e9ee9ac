"""What a tensor that a loader touches is: a stand-in, live memory, scratch memory that is followed, or plain values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from wsync.adapters.engines.known import KnownValues
from wsync.adapters.engines.live import LiveMemory, LivePlace
from wsync.adapters.engines.resolve import Landing, note_landing, resolve
from wsync.adapters.engines.sources import Buffer, Computed, Constant, Conversion, Initial, Part
from wsync.adapters.engines.standins import StandIn, StridedView, axes_of, write
from wsync.adapters.engines.strided import Axis, box_runs
from wsync.errors import RecordError, ShapeMismatchError

_ALLOCATES = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
"""Operations whose result holds no values yet."""


class TrackedMemory:
    """Follows values through the memory that a loader reads and writes.

    Attributes:
        live: the engine's.
        landings: what arrived in each live storage, in order of time; far offsets are elements of the storage.
        indirect: whether something arrived otherwise than straight from a checkpoint tensor or as a plain number.
    """

    def __init__(self, live: LiveMemory) -> None:
        self.live = live
        self.landings: list[list[Landing]] = [[] for _ in live.storages]
        self.indirect = False
        self._known = KnownValues(live, self.landings)
        self._live_buffers: dict[int, tuple[Buffer, int]] = {}
        self._scratch: dict[int, tuple[Buffer, torch.Tensor]] = {}
        self._allocated: dict[int, tuple[int, ...]] = {}
        # Held, so that the id of a storage is not given to another one.
        self._unwritten: dict[int, torch.Tensor] = {}

    # What a tensor is.

    def live_name(self, tensor: torch.Tensor) -> str | None:
        """The live tensor whose memory this is a view of."""
        return None if isinstance(tensor, StandIn) or tensor.is_meta else self.live.owner(tensor)

    def written_name(self, tensor: torch.Tensor) -> str | None:
        """The live tensor that a write to this changes, or would lie beside."""
        if isinstance(tensor, StandIn) or tensor.is_meta:
            return None
        return self.live.owner(tensor) or self.live.neighbour(tensor)

    def scratch_of(self, tensor: torch.Tensor) -> Buffer | None:
        """The buffer that follows this plain memory, if it is followed."""
        if isinstance(tensor, StandIn) or tensor.is_meta or not self._scratch:
            return None
        found = self._scratch.get(tensor.untyped_storage()._cdata)
        return found[0] if found else None

    def is_followed(self, tensor: torch.Tensor) -> bool:
        """Whether its values are not those that plain torch would read."""
        return isinstance(tensor, StandIn) or self.scratch_of(tensor) is not None or self.live_name(tensor) is not None

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor whose values no checkpoint changes, as plain memory; None where they are not known."""
        if not self.is_followed(tensor):
            return tensor
        # What is read here is read by the recorder, not by the loader.
        with _disable_current_modes():
            if isinstance(tensor, StandIn):
                return self._known.of_view(tensor.view_of_source)
            return None if self.live_name(tensor) is None else self._known.of_live(tensor)

    def view(self, tensor: torch.Tensor) -> StridedView | Constant | Computed:
        """What a tensor reads: a view of a source, plain values, or what cannot be followed."""
        if isinstance(tensor, StandIn):
            return tensor.view_of_source
        name = self.live_name(tensor)
        if name is not None:
            return self._live_view(name, tensor)
        buffer = self.scratch_of(tensor)
        if buffer is None and self._is_unwritten(tensor):
            return self.target(tensor)
        if buffer is None:
            return Constant(tensor.detach())
        if buffer.dtype.itemsize != tensor.element_size():
            return Computed(f"a view as {tensor.dtype} of {buffer.dtype}", frozenset(buffer.names))
        return _strided(buffer, int(tensor.storage_offset()), tensor)

    def target(self, tensor: torch.Tensor) -> StridedView:
        """The view of a buffer that a copy writes; plain memory becomes a buffer whose background are its values.

        Raises:
            RecordError: it cannot be followed.
        """
        if isinstance(tensor, StandIn):
            return tensor.view_of_source
        if self.scratch_of(tensor) is None:
            cdata = tensor.untyped_storage()._cdata
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            shape = self._allocated.get(cdata, (elements,))
            flat = tensor.detach().as_strided((elements,), (1,), 0)
            if flat.numel() != torch.Size(shape).numel():
                shape = (elements,)
            background = None if self._is_unwritten(tensor) else flat.view(shape)
            # The tensor is kept so that its storage's id is not given to another one.
            self._scratch[cdata] = (Buffer(shape, tensor.dtype, background), tensor)
        found = self.view(tensor)
        if not isinstance(found, StridedView):
            raise RecordError(f"the loader writes a tensor of shape {tuple(tensor.shape)} that cannot be followed")
        return found

    def names_of(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        """The checkpoint and live tensors that tensors are made of."""
        found: set[str] = set()
        for view in map(self.view, tensors):
            if not isinstance(view, Constant):
                found |= view.names if isinstance(view, Computed) else view.source.names
        return frozenset(found)

    def said(self, tensors: Iterable[torch.Tensor]) -> str:
        """The checkpoint and live tensors that tensors are made of, for messages."""
        found = sorted(self.names_of(tensors))
        return " and ".join(repr(n) for n in found) or "a tensor that is not from the checkpoint"

    def computation(self, func: Any, inputs: Iterable[torch.Tensor]) -> Computed:
        """What an operation on tensors makes; where those are computed already, the first operation is named."""
        inputs = list(inputs)
        earlier = ""
        for view in map(self.view, inputs):
            if isinstance(view, StridedView):
                earlier = earlier or view.source.computed
        return Computed(earlier or str(func), self.names_of(inputs))

    # What happens to memory.

    def executed(self, func: Any, mutated: Iterable[torch.Tensor], out: Any) -> None:
        """Remember the shape of memory that an executed operation allocated, and whether it has values."""
        for t in mutated:
            self._unwritten.pop(t.untyped_storage()._cdata, None)
        unwritten = func.overloadpacket.__name__ in _ALLOCATES
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_meta:
                cdata = t.untyped_storage()._cdata
                if t.is_contiguous() and not t.storage_offset():
                    self._allocated[cdata] = tuple(t.shape)
                if unwritten:
                    self._unwritten[cdata] = t

    def transfer(self, dst: torch.Tensor, src: torch.Tensor, *, literal: bool = False) -> None:
        """Follow ``dst.copy_(src)``; ``literal`` says that ``src`` is a number in the loader's own code.

        Raises:
            RecordError: the values are not those of a checkpoint tensor, or cannot be followed.
            ShapeMismatchError: ``src`` does not broadcast to ``dst``.
        """
        name = self.written_name(dst)
        try:
            if not dst.numel():
                torch.empty(src.shape, device="meta").expand(dst.shape)
                return
            source = self.view(src)
            if name is None:
                write(self.target(dst), source)
                return
            self.indirect |= not literal and not _is_straight(source)
            self.land(name, dst, source)
        except RuntimeError as e:
            where = f"the engine's {name!r}" if name else "a buffer"
            shapes = f"of shape {tuple(src.shape)} into {where} of shape {tuple(dst.shape)}"
            raise ShapeMismatchError(f"the loader copies {self.said([src])} {shapes}: {e}") from e

    def land(self, name: str, dst: torch.Tensor, src: StridedView | Constant | Computed) -> None:
        """Note what arrives in a view of live memory.

        Raises:
            RecordError: the values are not those of a checkpoint tensor, or cannot be followed.
            RuntimeError: as torch does, where ``src`` does not broadcast.
        """
        place = self.live.place(dst)
        if place is None:
            raise RecordError(
                f"the loader writes memory beside the engine's {name!r}, in a view of shape {tuple(dst.shape)}"
            )
        if isinstance(src, Computed):
            raise RecordError(
                f"the loader copies {src.operation}, which cannot be followed, into the engine's {name!r}"
            )
        if place.storage_idx in self._known.read:
            raise RecordError(
                f"the loader reads values of the engine's {name!r} and writes it later; what it decided by them cannot "
                "be recorded"
            )
        shape, strides = tuple(dst.shape), tuple(dst.stride())
        if isinstance(src, Constant):
            value = src.value.expand(shape) if src.value.dim() else src.value
            axes = tuple(Axis(n, 0, s) for n, s in zip(shape, strides, strict=True))
            conversions: tuple[Conversion, ...] = ((src.value.dtype, dst.dtype),)
            landings = [Landing(Constant(value), 0, place.offset, axes, conversions)]
        else:
            src = src.expanded(shape)
            conversions = () if src.dtype == dst.dtype else ((src.dtype, dst.dtype),)
            far = StridedView(src.source, place.offset, shape, strides, dst.dtype)
            try:
                held = self._live_buffer(place.storage_idx) if place.storage_idx in self._live_buffers else None
                landings = list(resolve(src.source, src.offset, place.offset, axes_of(src, far), conversions, held))
            except RecordError as e:
                raise RecordError(f"{e.message} (into the engine's {name!r})", hint=e.hint) from e
        arriving = [a for landing in landings if (a := self._arriving(name, place, landing)) is not None]
        self.landings[place.storage_idx].extend(arriving)

    def _is_unwritten(self, tensor: torch.Tensor) -> bool:
        return bool(self._unwritten) and tensor.untyped_storage()._cdata in self._unwritten

    def _arriving(self, name: str, place: LivePlace, landing: Landing) -> Landing | None:
        """A landing in the storage's dtype, or None where live bytes stay what they are."""
        source = landing.source
        if isinstance(source, Constant):
            value = source.value.detach().clone()
            for before, after in landing.conversions:
                value = value.view(before).to(after)
            value = value.view(self.live.storages[place.storage_idx].dtype)
            return landing._replace(source=Constant(value), conversions=())
        if isinstance(source, Part):
            return landing
        same_place = source.storage_idx == place.storage_idx and landing.near_offset == landing.far_offset
        if not same_place or landing.conversions or any(a.near != a.far for a in landing.axes if a.extent > 1):
            raise RecordError(
                f"the loader copies the engine's {source.name!r} into its {name!r}, but the checkpoint has not filled "
                f"it by then"
            )
        buffer = self._live_buffer(place.storage_idx)
        runs = box_runs(buffer.shape, landing.near_offset, landing.far_offset, landing.axes)
        return landing if any(buffer.is_written(run.box) for run in runs) else None

    # Live memory as a source: what arrived in it so far.

    def _live_view(self, name: str, tensor: torch.Tensor) -> StridedView | Computed:
        place = self.live.place(tensor)
        if place is None:
            return Computed(f"a view as {tensor.dtype} of live memory", frozenset([name]))
        return _strided(self._live_buffer(place.storage_idx), place.offset, tensor)

    def _live_buffer(self, storage_idx: int) -> Buffer:
        storage, landings = self.live.storages[storage_idx], self.landings[storage_idx]
        # Made when it is first read: most loaders never do.
        buffer, seen = self._live_buffers.get(storage_idx) or (
            Buffer(self.live.shape_of(storage), storage.dtype, Initial(storage_idx, storage.names[0])),
            0,
        )
        for landing in landings[seen:]:
            note_landing(buffer, landing)
        self._live_buffers[storage_idx] = (buffer, len(landings))
        return buffer


def _is_straight(view: StridedView | Constant | Computed) -> bool:
    """Whether a view is of a checkpoint tensor as it came."""
    return isinstance(view, StridedView) and isinstance(view.source, Part) and view.source.overwritten is None


def _strided(buffer: Buffer, offset: int, tensor: torch.Tensor) -> StridedView:
    return StridedView(buffer, offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
