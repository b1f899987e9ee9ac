"""Demand groups: all blocks with one set of holders, one set of needers and one stage, which are routed together."""

from __future__ import annotations

from dataclasses import dataclass

from wsync.plan.classes import TensorClass
from wsync.plan.flows import DemandGroup, Lot
from wsync.plan.rank_classes import Sinks


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """A demand group that knows classes of engine ranks but no engine ranks: it serves every number of replicas.

    Attributes:
        holders: trainer ranks that have a copy, ascending.
        needers: mask of the classes of engine ranks.
        stage: 0 for weights, 1 for scales.
        lots: what it consists of, in order of class.
        nbytes: that are expected to travel, once.
    """

    holders: tuple[int, ...]
    needers: int
    stage: int
    lots: tuple[Lot, ...]
    nbytes: int

    def with_sinks(self, sinks: Sinks) -> DemandGroup:
        """The group in one plan."""
        return DemandGroup(self.holders, sinks.of(self.needers), self.stage, self.lots, self.nbytes)


@dataclass(frozen=True, slots=True)
class OpenGroups:
    """All groups of some classes of tensors.

    Attributes:
        free: those that are routed for themselves.
        following: (class, unit) of scales whose sender must be one that packs a certain unit of weights, which has
            several holders. They go where that goes.
    """

    free: list[OpenGroup]
    following: list[tuple[int, int]]


def find_groups(classes: list[TensorClass]) -> OpenGroups:
    """The demand groups of all units, in order of first unit."""
    lots: dict[tuple[tuple[int, ...], int, int], list[Lot]] = {}
    ranks_of: dict[int, tuple[int, ...]] = {}
    following: list[tuple[int, int]] = []
    for class_idx, cls in enumerate(classes):
        count = len(cls.members)
        for unit_idx, unit in enumerate(cls.blocks.units):
            if unit.follows >= 0:
                following.append((class_idx, unit_idx))
                continue
            ranks = ranks_of.get(id(unit.holders))
            if ranks is None:
                ranks = ranks_of[id(unit.holders)] = tuple(rank for rank, _ in unit.holders)
            nbytes = cls.wire_bytes(unit)
            lots.setdefault((ranks, cls.needers(unit), unit.stage), []).append(Lot(class_idx, unit_idx, nbytes, count))
    free = [
        OpenGroup(ranks, needers, stage, tuple(found), sum(lot.nbytes * lot.num_members for lot in found))
        for (ranks, needers, stage), found in lots.items()
    ]
    return OpenGroups(free, following)
