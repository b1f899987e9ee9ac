"""Demand groups, and the flows that serve them: a plan factored by class, as small as the classes are few.

Nothing here lists tensors one by one. Tensors of one class share their units; a flow says which units of which members
of a class a trainer rank sends along which tree. Ranks expand their own flows into buckets and pieces
(`wsync.plan.slices`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

LOCAL = -1
"""The rail of a hop that stays inside a node or NVLink domain."""


class Tree(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A delivery tree, independent of who sends.

    Attributes:
        sinks: indices of the engine ranks that need what travels here, ascending.
        hops: as (from, to) sink indices in an order in which every sender has received before; ``SOURCE`` stands for
            the trainer rank. Every sink of ``sinks`` is the target of exactly one hop.
        rails: for each hop the index of the rail (the NIC of both nodes) that it takes, `LOCAL` inside a domain.
    """

    sinks: tuple[int, ...]
    hops: tuple[tuple[int, int], ...]
    rails: tuple[int, ...]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One unit of consecutive members of one class.

    Attributes:
        class_idx: into the plan's classes.
        unit_idx: into the class's units.
        shard_idx: which of the sender's boxes of these tensors holds it.
        first, end: the members.
    """

    class_idx: int
    unit_idx: int
    shard_idx: int
    first: int
    end: int


class Flow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one trainer rank sends along one tree, in one stage, in order.

    Attributes:
        first_bucket: number of its first bucket; those of two flows never meet.
        src_rank: the trainer rank.
        stage: 0 for weights, 1 for scales, which are packed after all weights of the rank.
        tree_idx: into the plan's trees.
        entries: what travels, in order of packing.
        nbytes: of all its pieces, each rounded up to ALIGNMENT; it needs about ``ceil(nbytes / bucket_bytes)`` buckets.
        delta_bytes: what is expected to travel where some of it is planned as a delta; -1 where all of it is dense.
    """

    first_bucket: int
    src_rank: int
    stage: int
    tree_idx: int
    entries: tuple[Entry, ...]
    nbytes: int
    delta_bytes: int = -1

    @property
    def wire_bytes(self) -> int:
        """What is expected to travel."""
        return self.nbytes if self.delta_bytes < 0 else self.delta_bytes


class Lot(NamedTuple):
    """Equal pieces of the tensors of one class: one unit, of every member.

    Attributes:
        class_idx, unit_idx: which unit.
        nbytes: wire bytes of one member's piece that are expected to travel, without padding.
        num_members: how many.
    """

    class_idx: int
    unit_idx: int
    nbytes: int
    num_members: int


@dataclass(frozen=True, slots=True)
class DemandGroup:
    """All blocks with equal holders, needers and stage.

    Attributes:
        holders: trainer ranks that have a copy, ascending.
        sinks: engine ranks that need it, ascending.
        stage: 0 for weights, 1 for scales.
        lots: what it consists of, in order of tensor.
        nbytes: wire bytes of all lots that are expected to travel, once.
    """

    holders: tuple[int, ...]
    sinks: tuple[int, ...]
    stage: int
    lots: tuple[Lot, ...]
    nbytes: int


class Share(NamedTuple):
    """A part of a group's bytes, by the trainer rank and the tree that carry it."""

    src_rank: int
    tree_idx: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Route:
    """How a group's bytes reach some of its sinks.

    Attributes:
        sinks: those that it serves; the routes of a group have all of the group's sinks, none twice.
        shares: in order; together they have all of the group's bytes.
    """

    sinks: tuple[int, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """The routes of every group.

    Attributes:
        trees: that shares refer to, without duplicates.
        routes: of each group.
    """

    trees: list[Tree]
    routes: list[tuple[Route, ...]]
