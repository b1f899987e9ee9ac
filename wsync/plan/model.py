"""What is known for one set of classes of engine ranks, however many ranks each of them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wsync.plan.blocks import Unit
from wsync.plan.classes import Classes, ClassKey, TensorClass, plan_classes
from wsync.plan.delta_size import Densities
from wsync.plan.demand import Boxes, Demand, Encodings, collect_demands
from wsync.plan.flow_sizes import FlowSizes, scanned_bytes, weight_bytes
from wsync.plan.flows import DemandGroup, Lot
from wsync.plan.groups import OpenGroups, find_groups
from wsync.plan.holdings import Holdings
from wsync.plan.plans import PlanClass, ScaleGroup
from wsync.plan.rank_classes import Sinks
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SinkRankManifest

_MAX_GONE = 64
"""Classes of engine ranks that are gone or were refused before what was worked out for them is forgotten."""


@dataclass(frozen=True, slots=True)
class Model:
    """One set of classes of engine ranks.

    Attributes:
        mask: of the classes.
        bucket_bytes: size of every bucket.
        classes, plan_classes: of tensors.
        scale_groups, amax_elements: of the exchanged vector.
        groups: of demand.
        needed_bytes: that each rank of a set of classes needs, by the mask of the set.
        asked_bytes: that each rank of a class asks for, by its number.
        packed_bytes: of each unit of each class what packing it once reads and writes.
        flow_sizes: of the flows that were made of it.
    """

    mask: int
    bucket_bytes: int
    classes: list[TensorClass]
    plan_classes: tuple[PlanClass, ...]
    scale_groups: tuple[ScaleGroup, ...]
    amax_elements: int
    groups: OpenGroups
    needed_bytes: dict[int, int]
    asked_bytes: dict[int, int]
    packed_bytes: list[list[int]]
    flow_sizes: FlowSizes

    def all_groups(self, sinks: Sinks) -> list[DemandGroup]:
        """The groups that are routed, and then the scales that follow weights: any holder may send them."""
        lots: dict[tuple[tuple[int, ...], int], list[Lot]] = {}
        for class_idx, unit_idx in self.groups.following:
            cls = self.classes[class_idx]
            unit = cls.blocks.units[unit_idx]
            key = (tuple(rank for rank, _ in unit.holders), cls.needers(unit))
            lots.setdefault(key, []).append(Lot(class_idx, unit_idx, cls.wire_bytes(unit), len(cls.members)))
        following = [
            DemandGroup(ranks, sinks.of(needers), 1, tuple(found), sum(x.nbytes * x.num_members for x in found))
            for (ranks, needers), found in lots.items()
        ]
        return [*(g.with_sinks(sinks) for g in self.groups.free), *following]

    def group_packed_bytes(self, groups: Sequence[DemandGroup]) -> list[int]:
        """For each of `all_groups` what packing it once reads and writes."""
        packed = self.packed_bytes
        return [sum(packed[x.class_idx][x.unit_idx] * x.num_members for x in g.lots) for g in groups]

    def group_host_bytes(self, groups: Sequence[DemandGroup]) -> list[int]:
        """For each of `all_groups` the weights that packing it once reads."""
        units = [
            [weight_bytes(u, n) for u, n in zip(cls.blocks.units, packed, strict=True)]
            for cls, packed in zip(self.classes, self.packed_bytes, strict=True)
        ]
        return [sum(units[x.class_idx][x.unit_idx] * x.num_members for x in g.lots) for g in groups]

    def scanned_bytes(self, num_sources: int) -> list[int]:
        """For each trainer rank the weights whose amaxes it finds before they are packed."""
        return scanned_bytes(self.plan_classes, (c.members[0].encoding.dtype for c in self.classes), num_sources)


class Models:
    """Makes models of one source, and keeps what several have in common.

    Args:
        holdings: what the trainer ranks hold.
        densities: of their tensors.
    """

    def __init__(self, holdings: Holdings, densities: Densities) -> None:
        self._holdings = holdings
        self._densities = densities
        self._gone = 0
        self._forget()

    def _forget(self) -> None:
        self._encodings = Encodings(Boxes())
        self._classes = Classes(self._holdings, self._encodings, self._densities)

    def gone(self, count: int) -> None:
        """Count classes of engine ranks that are gone or were refused, and after many forget what they left behind."""
        self._gone += count
        if self._gone > _MAX_GONE:
            self._gone = 0
            self._forget()

    def make(
        self, sinks: Sinks, firsts: Mapping[int, SinkRankManifest], bucket_bytes: Callable[[dict[int, int]], int]
    ) -> Model:
        """The model of the classes of some engine ranks.

        Args:
            sinks: the ranks.
            firsts: one rank of each class.
            bucket_bytes: chooses the size of a bucket by what each class asks for.

        Raises:
            WsyncError: as `make_plan`.
        """
        ranks = [(number, firsts[number]) for number in sorted(sinks.by_class)]
        members = self._classes.group(collect_demands(self._holdings, ranks, self._encodings))
        asked = _asked_bytes(members, self._encodings.boxes.values)
        size = bucket_bytes(asked)
        classes = self._classes.intersect(members, size, sinks.first)
        made, scale_groups, elements = plan_classes(classes, self._holdings.target_of)
        packed = _packed_bytes(classes)
        return Model(
            sinks.mask,
            size,
            classes,
            made,
            scale_groups,
            elements,
            find_groups(classes),
            _needed_bytes(classes),
            asked,
            packed,
            FlowSizes(made, packed, size),
        )


def _asked_bytes(members: Mapping[ClassKey, list[Demand]], boxes: Sequence[Box]) -> dict[int, int]:
    asked: dict[int, int] = {}
    for (*_, claims), demands in members.items():
        parts = demands[0].encoding.parts
        for part, number, box_idx in claims:
            nbytes = boxes[box_idx].num_elements * itemsize(parts[part].dtype) * len(demands)
            asked[number] = asked.get(number, 0) + nbytes
    return asked


def _needed_bytes(classes: Sequence[TensorClass]) -> dict[int, int]:
    found: dict[int, int] = {}
    for cls in classes:
        for unit in cls.blocks.units:
            needers = cls.needers(unit)
            found[needers] = found.get(needers, 0) + unit.nbytes * len(cls.members)
    return found


def _packed_bytes(classes: Sequence[TensorClass]) -> list[list[int]]:
    """Of each unit the weights that are read and what is written. Scales are read from the rank's table of them."""
    known: dict[tuple[int, int], list[int]] = {}
    out = []
    for cls in classes:
        encoding = cls.members[0].encoding
        read_bytes = itemsize(encoding.dtype) * encoding.recipe.packed

        def packed(unit: Unit, read_bytes: int = read_bytes) -> int:
            return unit.nbytes + (unit.nbytes if unit.part else unit.box.num_elements * read_bytes)

        key = (id(cls.blocks), read_bytes)
        if key not in known:
            known[key] = [packed(unit) for unit in cls.blocks.units]
        out.append(known[key])
    return out
