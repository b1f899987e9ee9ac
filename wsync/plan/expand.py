"""Flows expanded to buckets: what the factored plan means, piece by piece.

Each flow is expanded by itself, so that sender and engine ranks get the same buckets from the flows that they have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wsync.errors import ConfigError
from wsync.plan.flows import Flow, Tree
from wsync.plan.packing import Placed, aligned, bucket_room, place
from wsync.plan.plans import Plan, PlanClass, ScaleGroup
from wsync.plan.types import AmaxRegion, Bucket, Piece, WirePart
from wsync.spec.dtypes import itemsize


@dataclass
class Expansion:
    """Expands flows, and numbers the parts that occur in order of first use.

    Attributes:
        classes, scale_groups, names: of the plan, or of a slice of it; names by index of the tensor.
        bucket_bytes: size of a bucket.
        parts: that were used so far.
    """

    classes: Sequence[PlanClass]
    scale_groups: Sequence[ScaleGroup]
    names: dict[int, str]
    bucket_bytes: int
    parts: list[WirePart] = field(default_factory=list)
    _part_idx: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    _placed: dict[tuple[int, int, int], tuple[list[Placed], int]] = field(default_factory=dict)

    def buckets(self, flows: Iterable[Flow], trees: Sequence[Tree]) -> tuple[Bucket, ...]:
        """The buckets of some flows, in the order in which they are packed, sent and received.

        That order is by stage, then by how far the flow is, then by flow. Every rank knows it of its own flows, so that
        all senders and engine ranks go through the buckets that they share in one order: a ring of few buckets never
        waits for itself.
        """
        queue: list[tuple[int, float, int, Flow, list[Piece]]] = []
        for flow in flows:
            packed = self._pack(flow)
            if len(packed) > bucket_room(flow.nbytes, self.bucket_bytes):
                raise ConfigError(
                    f"the flow of {flow.nbytes} bytes at bucket {flow.first_bucket} has {len(packed)} buckets of "
                    f"{self.bucket_bytes} bytes, numbers are kept for {bucket_room(flow.nbytes, self.bucket_bytes)}"
                )
            # Equal fractions give equal floats, and others differ: there are fewer than 2^26 buckets.
            queue += [(flow.stage, i / len(packed), flow.first_bucket + i, flow, p) for i, p in enumerate(packed)]
        queue.sort(key=lambda q: (q[0], q[1], q[3].first_bucket))
        out = []
        for stage, _, bucket_idx, flow, pieces in queue:
            used = aligned(pieces[-1].offset + pieces[-1].nbytes)
            tree = trees[flow.tree_idx]
            out.append(Bucket(bucket_idx, flow.src_rank, stage, used, tuple(pieces), tree.sinks, tree.hops))
        return tuple(out)

    def part_idx(self, class_idx: int, member: int, part: int) -> int:
        """Number of a part of a member of a class."""
        numbers = self._numbers(class_idx, part)
        if numbers[member] < 0:
            numbers[member] = self._new_part(class_idx, member, part)
        return numbers[member]

    def _numbers(self, class_idx: int, part: int) -> list[int]:
        """For each member of a class the number of one of its parts, -1 for those that were not used yet."""
        found = self._part_idx.get((class_idx, part))
        if found is None:
            found = self._part_idx[class_idx, part] = [-1] * len(self.classes[class_idx].members)
        return found

    def _new_part(self, class_idx: int, member: int, part: int) -> int:
        self.parts.append(self._part(class_idx, member, part))
        return len(self.parts) - 1

    def _part(self, class_idx: int, member: int, part: int) -> WirePart:
        cls = self.classes[class_idx]
        facts, tensor_idx = cls.parts[part], cls.members[member]
        group: tuple[str, ...] = ()
        if cls.groups:
            group = tuple(self.names[i] for i in self.scale_groups[cls.groups[member]].tensors)
        name = self.names[tensor_idx] + facts.suffix
        return WirePart(tensor_idx, cls.recipe, facts.role, name, facts.dtype, facts.shape, group)

    def _pack(self, flow: Flow) -> list[list[Piece]]:
        """Fill one bucket after the other, in order; a piece that does not fit is cut where the bucket ends."""
        out: list[list[Piece]] = []
        pieces: list[Piece] = []
        offset, size = 0, self.bucket_bytes
        for entry in flow.entries:
            class_idx, unit_idx, shard_idx = entry.class_idx, entry.unit_idx, entry.shard_idx
            unit = self.classes[class_idx].units[unit_idx]
            part, box, mode, nbytes = unit.part, unit.box, unit.mode, unit.nbytes
            numbers = self._numbers(class_idx, part)
            step = aligned(nbytes)
            for member in range(entry.first, entry.end):
                part_idx = numbers[member]
                if part_idx < 0:
                    part_idx = numbers[member] = self._new_part(class_idx, member, part)
                if offset + nbytes <= size:
                    pieces.append(Piece(part_idx, shard_idx, box, mode, offset, nbytes))
                    offset += step
                    continue
                placed, offset = self._place(class_idx, unit_idx, offset)
                for opens, cut, at, cut_bytes in placed:
                    if opens:
                        out.append(pieces)
                        pieces = []
                    pieces.append(Piece(part_idx, shard_idx, cut, mode, at, cut_bytes))
        if pieces:
            out.append(pieces)
        return out

    def _place(self, class_idx: int, unit_idx: int, offset: int) -> tuple[list[Placed], int]:
        """Where the parts of a unit that does not fit behind ``offset`` go, and the offset behind the last one."""
        key = (class_idx, unit_idx, offset)
        found = self._placed.get(key)
        if found is None:
            cls = self.classes[class_idx]
            unit = cls.units[unit_idx]
            elem_bytes = itemsize(cls.parts[unit.part].dtype)
            found = place(unit.box, elem_bytes, unit.step, offset, self.bucket_bytes)
            self._placed[key] = found
        return found

    def regions(self, rank: int) -> tuple[AmaxRegion, ...]:
        """The boxes whose amaxes a trainer rank exchanges."""
        out = []
        for class_idx, cls in enumerate(self.classes):
            for shard_idx, box in [(shard_idx, box) for r, shard_idx, box in cls.amax if r == rank]:
                for member in range(len(cls.members)):
                    first = cls.amax_first + member * cls.grid_elements
                    if cls.groups:
                        first = self.scale_groups[cls.groups[member]].amax_first
                    out.append(AmaxRegion(self.part_idx(class_idx, member, 0), shard_idx, box, first))
        return tuple(out)


@dataclass(frozen=True, slots=True)
class ExpandedPlan:
    """A whole plan, piece by piece: for small models, to look at or to check.

    Attributes:
        parts: what travels.
        buckets: all of them, in order of packing.
        amax_regions: for each trainer rank.
    """

    parts: tuple[WirePart, ...]
    buckets: tuple[Bucket, ...]
    amax_regions: tuple[tuple[AmaxRegion, ...], ...]


def expand_plan(plan: Plan) -> ExpandedPlan:
    """Expand all flows of a plan."""
    expansion = Expansion(plan.classes, plan.scale_groups, dict(enumerate(plan.names)), plan.bucket_bytes)
    buckets = expansion.buckets(plan.flows, plan.trees)
    regions = tuple(expansion.regions(rank) for rank in range(plan.num_sources))
    return ExpandedPlan(tuple(expansion.parts), buckets, regions)
