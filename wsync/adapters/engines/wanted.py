"""A first look at an engine: in which dtype it wants each tensor of the checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from wsync.adapters.engines.live import LiveMemory
from wsync.adapters.engines.offering import LoadWeights, offered_parts, run_on_stand_ins
from wsync.adapters.engines.sources import Computed, Constant, Part
from wsync.adapters.engines.standins import StridedView
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.errors import RecordError
from wsync.spec.manifest import TensorSpec


def wanted_recipes(
    load_weights: LoadWeights,
    name_table: Sequence[TensorSpec],
    params: Mapping[str, torch.Tensor],
    *,
    module: nn.Module | None = None,
) -> dict[str, frozenset[torch.dtype]]:
    """Run an engine's loader on an unquantised checkpoint of stand-ins, and say where each tensor goes.

    An engine whose weights are e4m3 names that dtype here: those tensors need a block recipe. Conversions, tensors that
    are missing (scales) and values that the loader computes are no errors here. No live byte changes.

    Args:
        load_weights, name_table, params, module: as for `record_loader`.

    Returns:
        For each checkpoint tensor that reaches live memory, the dtypes of that memory.

    Raises:
        RecordError: the loader failed, or decides by values.
        ShapeMismatchError: a copy's shapes differ.
        StateError: the loader replaced live memory.
    """
    memory = _Destinations(LiveMemory(params))
    run_on_stand_ins(load_weights, offered_parts(name_table, None), memory, module)
    return memory.dtypes()


class _Destinations(TrackedMemory):
    """Follows a loader, and what it cannot follow it knows by name."""

    def __init__(self, live: LiveMemory) -> None:
        super().__init__(live)
        self._by_name: dict[str, set[torch.dtype]] = defaultdict(set)

    def land(self, name: str, dst: torch.Tensor, src: StridedView | Constant | Computed) -> None:
        """Note what arrives; where it was computed, what it was made of."""
        try:
            super().land(name, dst, src)
        except RecordError:
            names = src.names if isinstance(src, Computed) else src.source.names if isinstance(src, StridedView) else ()
            for checkpoint_name in names:
                self._by_name[checkpoint_name].add(self.live.tensors[name].dtype)

    def dtypes(self) -> dict[str, frozenset[torch.dtype]]:
        """Of the live memory that each checkpoint tensor reaches."""
        found = {name: set(dtypes) for name, dtypes in self._by_name.items() if name not in self.live.tensors}
        for storage, landings in zip(self.live.storages, self.landings, strict=True):
            for landing in landings:
                if isinstance(landing.source, Part):
                    found.setdefault(landing.source.spec.name, set()).add(storage.dtype)
        return {name: frozenset(dtypes) for name, dtypes in found.items()}
