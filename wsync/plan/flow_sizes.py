"""How many buckets a flow has and what packing it costs, counted once for all plans that have it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wsync.plan.blocks import Unit
from wsync.plan.flows import Entry, Flow
from wsync.plan.packing import BucketCounter
from wsync.plan.parts import PlanClass, PlanUnit
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import get_recipe


class FlowSize(NamedTuple):
    """Of one flow: its buckets, the bytes that packing it reads and writes, and those of weights that it reads."""

    num_buckets: int
    packed_bytes: int
    host_bytes: int


class FlowSizes:
    """Counts the flows of some classes of tensors. A patch of a plan keeps most flows, and these are not counted again.

    Args:
        classes: of tensors.
        packed_bytes: of each unit of each class.
        bucket_bytes: size of a bucket.
    """

    def __init__(self, classes: Sequence[PlanClass], packed_bytes: Sequence[Sequence[int]], bucket_bytes: int) -> None:
        self._classes = classes
        self._packed = packed_bytes
        self._elem_bytes = [[itemsize(cls.parts[u.part].dtype) for u in cls.units] for cls in classes]
        self._counter = BucketCounter(bucket_bytes)
        # Entries are kept: an id is one object's.
        self._known: dict[int, tuple[tuple[Entry, ...], FlowSize]] = {}

    def of(self, flows: Iterable[Flow]) -> list[FlowSize]:
        """The sizes of all flows of a plan."""
        found: dict[int, tuple[tuple[Entry, ...], FlowSize]] = {}
        out = []
        for flow in flows:
            key = id(flow.entries)
            entry = found[key] = self._known.get(key) or (flow.entries, self._count(flow.entries))
            out.append(entry[1])
        self._known = found
        return out

    def _count(self, entries: tuple[Entry, ...]) -> FlowSize:
        at, packed, weights = (0, 0), 0, 0
        for class_idx, unit_idx, count in ((e.class_idx, e.unit_idx, e.end - e.first) for e in entries):
            unit = self._classes[class_idx].units[unit_idx]
            at = self._counter.add(at, unit.box, self._elem_bytes[class_idx][unit_idx], unit.step, count)
            packed += self._packed[class_idx][unit_idx] * count
            weights += weight_bytes(unit, self._packed[class_idx][unit_idx]) * count
        return FlowSize(at[0] + (at[1] > 0), packed, weights)


def weight_bytes(unit: Unit | PlanUnit, packed_bytes: int) -> int:
    """Of what packing a unit reads and writes, the weights that it reads. Scales are read from the rank's table."""
    return 0 if unit.part else packed_bytes - unit.nbytes


def scanned_bytes(classes: Sequence[PlanClass], dtypes: Iterable[str], num_sources: int) -> list[int]:
    """For each trainer rank the weights whose amaxes it finds before they are packed.

    Args:
        classes: of the plan.
        dtypes: of the weights of each class, as the trainer holds them.
        num_sources: trainer ranks.
    """
    found = [0] * num_sources
    for cls, dtype in zip(classes, dtypes, strict=True):
        elem_bytes = itemsize(dtype) * get_recipe(cls.recipe).packed
        for rank, _, box in cls.amax:
            found[rank] += box.num_elements * elem_bytes * len(cls.members)
    return found
