"""Values that a loader may decide by, because no checkpoint changes them: its own numbers, and the engine's own tables.

An engine's buffer that the loader does not write (which experts are here) has the same values at every sync. What the
loader copies out of it, or indexes in it, has too.
"""

from __future__ import annotations

import torch

from wsync.adapters.engines.live import LiveMemory
from wsync.adapters.engines.resolve import Landing, resolve
from wsync.adapters.engines.sources import Buffer, Constant, Initial
from wsync.adapters.engines.standins import StridedView, axes_of
from wsync.errors import RecordError
from wsync.spec.box import contiguous_strides


class KnownValues:
    """Reads followed memory whose values do not depend on the checkpoint.

    Attributes:
        read: live storages whose values the loader has seen; it must not fill them later.
    """

    def __init__(self, live: LiveMemory, landings: list[list[Landing]]) -> None:
        self.read: set[int] = set()
        self._live = live
        self._landings = landings

    def of_live(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a view of live memory, or None where the checkpoint fills it."""
        place = self._live.place(tensor)
        if place is None or not self._is_own(place.storage_idx):
            return None
        self.read.add(place.storage_idx)
        return tensor.detach().clone()

    def of_view(self, view: StridedView) -> torch.Tensor | None:
        """The values of a view of a buffer, or None where they come from the checkpoint. Whole numbers only."""
        source = view.source
        if not isinstance(source, Buffer) or view.dtype.is_floating_point or view.dtype.is_complex:
            return None
        if source.dtype != view.dtype or not source.names <= self._own_names():
            return None
        out = torch.empty(view.shape, dtype=view.dtype)
        far = StridedView(source, 0, view.shape, contiguous_strides(view.shape), view.dtype)
        read: set[int] = set()
        try:
            for landing in resolve(source, view.offset, 0, axes_of(view, far)):
                value = self._value(landing, read)
                if value is None:
                    return None
                place = out.as_strided(
                    [a.extent for a in landing.axes], [a.far for a in landing.axes], landing.far_offset
                )
                place.copy_(value)
        except RecordError:
            return None
        self.read |= read
        return out

    def _value(self, landing: Landing, read: set[int]) -> torch.Tensor | None:
        source = landing.source
        if isinstance(source, Initial):
            if not self._is_own(source.storage_idx):
                return None
            read.add(source.storage_idx)
            extents, strides = [a.extent for a in landing.axes], [a.near for a in landing.axes]
            flat = self._live.flat(source.storage_idx)
            value = flat.as_strided(extents, strides, int(flat.storage_offset()) + landing.near_offset)
        elif isinstance(source, Constant):
            value = source.value
        else:
            return None
        for before, after in landing.conversions:
            value = value.view(before).to(after)
        return value

    def _is_own(self, storage_idx: int) -> bool:
        return not self._live.storages[storage_idx].is_parameter and not self._landings[storage_idx]

    def _own_names(self) -> set[str]:
        return {name for i, s in enumerate(self._live.storages) if self._is_own(i) for name in s.names}
