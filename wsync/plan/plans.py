"""The plan, factored by class: as small as the classes of tensors are few, whatever the number of tensors."""

from __future__ import annotations

from functools import cached_property

import msgspec

from wsync.errors import ConfigError, WireError
from wsync.plan.flows import Flow, Tree
from wsync.plan.names import Names
from wsync.plan.packing import BucketCounter
from wsync.plan.types import ALIGNMENT, SOURCE, Bound
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.serde import check_format, decode, digest_of, encode


class PlanPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One part of every tensor of a class.

    Attributes:
        role: ``"weight"``, ``"scale"`` or ``"scale_2"``.
        suffix: appended to the tensor's name.
        dtype: on the wire.
        shape: global, in elements on the wire, with as many dimensions as the tensor: a tensor of scales that has fewer
            in the engine ends in ones here.
    """

    role: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]


class PlanUnit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One box of every tensor of a class, which travels in one go unless a bucket ends within it.

    Attributes:
        part: which of the class's parts.
        box: in the part's coordinates.
        mode: MODE_COPY, MODE_FUSED or MODE_SCALED.
        step: cuts in the last two dimensions (rows, columns) fall on multiples of these.
        nbytes: on the wire as it is.
        wire_bytes: expected to travel: fewer than ``nbytes`` where it is planned as a delta.
    """

    part: int
    box: Box
    mode: int
    step: tuple[int, int]
    nbytes: int
    wire_bytes: int

    @property
    def planned(self) -> str:
        """``"delta"`` or ``"dense"``."""
        return "delta" if self.wire_bytes < self.nbytes else "dense"


class PlanClass(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tensors of one shape, placement and recipe.

    Attributes:
        recipe: how they are encoded.
        parts: the weight first, then its scales.
        units: weights first, then scales.
        members: indices of the tensors in the source manifest, ascending.
        groups: for each member its scale group in the plan, or empty where none shares its amax.
        amax: (trainer rank, shard index, box of the weight) whose amaxes are exchanged, of every member.
        grid_elements: amaxes of one member in the exchanged vector; 0 where none is exchanged.
        amax_first: element of the vector where those of the first member begin, one member behind the other. Members
            with a scale group have theirs where the group's begin.
    """

    recipe: str
    parts: tuple[PlanPart, ...]
    units: tuple[PlanUnit, ...]
    members: tuple[int, ...]
    groups: tuple[int, ...]
    amax: tuple[tuple[int, int, Box], ...]
    grid_elements: int
    amax_first: int


class ScaleGroup(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tensors that share their amaxes in one recipe.

    Attributes:
        tensors: indices in the source manifest, in order of name.
        amax_first: element of the exchanged vector where the shared amaxes begin.
    """

    tensors: tuple[int, ...]
    amax_first: int


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A global plan: what every rank packs, sends, relays and installs, and how good that is.

    Attributes:
        format_version: of this encoding.
        num_sources, num_sinks: ranks on each side.
        bucket_bytes: size of every bucket.
        names: of the source's tensors.
        classes: of tensors.
        scale_groups: of tensors that share their amaxes.
        trees: that flows refer to.
        flows: in order of number; see `wsync.plan.slices` for what they mean on a rank.
        amax_elements: f32 elements of the vector that the trainer ranks exchange; 0 where none does.
        needed_bytes: that the engine ranks need, each counted for itself.
        bounds: every cut that was looked at, the slowest first.
        time_s: predicted seconds of this plan.
        fill_s: of these, until the pipelines are full.
        amax_s: of these, for the exchange of amaxes before packing.
        aliases: name of a tied tensor -> name of the tensor under which its bytes travel.
    """

    format_version: int
    num_sources: int
    num_sinks: int
    bucket_bytes: int
    names: tuple[str, ...]
    classes: tuple[PlanClass, ...]
    scale_groups: tuple[ScaleGroup, ...]
    trees: tuple[Tree, ...]
    flows: tuple[Flow, ...]
    amax_elements: int
    needed_bytes: int
    bounds: tuple[Bound, ...]
    time_s: float
    fill_s: float = 0.0
    amax_s: float = 0.0
    aliases: dict[str, str] = {}

    @property
    def lower_bound_s(self) -> float:
        """Seconds that no plan can beat on this cluster."""
        return self.bounds[0].seconds if self.bounds else 0.0

    @property
    def binding_cut(self) -> str:
        """Name of the cut that gives the lower bound."""
        return self.bounds[0].name if self.bounds else ""

    @property
    def score(self) -> float:
        """Predicted time over lower bound; 1.0 proves the plan optimal."""
        return self.time_s / self.lower_bound_s if self.lower_bound_s > 0 else 1.0

    @cached_property
    def flow_bytes(self) -> tuple[int, ...]:
        """Bytes of each flow's pieces, without padding, as they are packed."""
        classes = self.classes
        return tuple(
            sum(classes[e.class_idx].units[e.unit_idx].nbytes * (e.end - e.first) for e in flow.entries)
            for flow in self.flows
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes that leave the trainer ranks' packing, without padding."""
        return sum(self.flow_bytes)

    @property
    def sink_bytes(self) -> int:
        """Bytes that engine ranks receive and need, each counted for itself, without padding."""
        pairs = zip(self.flows, self.flow_bytes, strict=True)
        return sum(nbytes * len(self.trees[flow.tree_idx].sinks) for flow, nbytes in pairs)

    @property
    def delivered_bytes(self) -> int:
        """Bytes that engine ranks receive, needed or only to be relayed, without padding."""
        pairs = zip(self.flows, self.flow_bytes, strict=True)
        return sum(nbytes * len(self.trees[flow.tree_idx].hops) for flow, nbytes in pairs)

    def num_buckets(self, flow: Flow) -> int:
        """At least how many buckets a flow has, at little cost; `flow_buckets` are all counted."""
        return -(-flow.nbytes // self.bucket_bytes)

    @cached_property
    def flow_buckets(self) -> tuple[int, ...]:
        """How many buckets each flow has."""
        counter = BucketCounter(self.bucket_bytes)
        sizes = [[itemsize(cls.parts[u.part].dtype) for u in cls.units] for cls in self.classes]
        out = []
        for flow in self.flows:
            at = (0, 0)
            for e in flow.entries:
                unit = self.classes[e.class_idx].units[e.unit_idx]
                at = counter.add(at, unit.box, sizes[e.class_idx][e.unit_idx], unit.step, e.end - e.first)
            out.append(at[0] + (at[1] > 0))
        return tuple(out)

    @cached_property
    def flows_of_source(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of each trainer rank's flows."""
        found: list[list[int]] = [[] for _ in range(self.num_sources)]
        for i, flow in enumerate(self.flows):
            found[flow.src_rank].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def flows_of_sink(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the flows that each engine rank needs."""
        found: list[list[int]] = [[] for _ in range(self.num_sinks)]
        for i, flow in enumerate(self.flows):
            for sink_idx in self.trees[flow.tree_idx].sinks:
                found[sink_idx].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def amax_of_source(self) -> tuple[dict[int, tuple[tuple[int, int, Box], ...]], ...]:
        """For each trainer rank what it exchanges of each class."""
        found: list[dict[int, tuple[tuple[int, int, Box], ...]]] = [{} for _ in range(self.num_sources)]
        for class_idx, cls in enumerate(self.classes):
            for entry in cls.amax:
                of_rank = found[entry[0]]
                of_rank[class_idx] = (*of_rank.get(class_idx, ()), entry)
        return tuple(found)

    @cached_property
    def packed_names(self) -> dict[tuple[int, ...], tuple[tuple[int, ...], Names]]:
        """For sets of classes, as they were asked for, the tensors that they name and these tensors' names."""
        return {}

    @cached_property
    def source_buckets(self) -> tuple[int, ...]:
        """How many buckets each trainer rank packs."""
        counts = [0] * self.num_sources
        for flow, count in zip(self.flows, self.flow_buckets, strict=True):
            counts[flow.src_rank] += count
        return tuple(counts)

    @cached_property
    def sink_buckets(self) -> tuple[int, ...]:
        """How many buckets each engine rank receives."""
        of_tree = [0] * len(self.trees)
        for flow, count in zip(self.flows, self.flow_buckets, strict=True):
            of_tree[flow.tree_idx] += count
        counts = [0] * self.num_sinks
        for tree, count in zip(self.trees, of_tree, strict=True):
            for sink_idx in tree.sinks:
                counts[sink_idx] += count
        return tuple(counts)

    def source_memory_bytes(self, rank: int, *, delta: bool = False) -> int:
        """What a trainer rank stages; with ``delta`` it also keeps what it sent last, and one bucket."""
        _check_index("trainer rank", rank, self.num_sources)
        count = self.source_buckets[rank]
        return (2 * count + 1 if delta else count) * self.bucket_bytes

    def sink_memory_bytes(self, sink_idx: int, mode: str = "staged", *, delta: bool = False) -> int:
        """What an engine rank stages, besides the live weights.

        Args:
            sink_idx: of the rank.
            mode: ``"staged"`` holds a whole version, ``"paused"`` a ring of `RING_BUCKETS`.
            delta: the rank also keeps the version before, and one bucket.

        Raises:
            ConfigError: an unknown mode, or a rank that is not there.
        """
        _check_index("sink", sink_idx, self.num_sinks)
        if mode not in ("staged", "paused"):
            raise ConfigError(f"sink mode is {mode!r}, allowed are staged and paused")
        count = self.sink_buckets[sink_idx]
        held = count if mode == "staged" else min(count, RING_BUCKETS)
        return (held + (count + 1 if delta else 0)) * self.bucket_bytes


RING_BUCKETS = 8
"""Buckets of a ring that is written in place: two of each stage of a pipeline of receiving, relaying, unpacking."""


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ConfigError(f"{what} {index} is not in a plan of {count}")


def plan_digest(plan: Plan) -> str:
    """Hex digest of the whole plan; equal plans have equal digests on every machine."""
    return digest_of(plan)


def _check_tree(tree: Tree, num_sinks: int) -> None:
    """Refuse a tree on which a rank that is not there sends, or one that has nothing, or receives twice."""
    if len(tree.hops) != len(tree.rails):
        raise WireError(f"a plan's tree has {len(tree.hops)} hops, but rails of {len(tree.rails)}")
    has = {SOURCE}
    for src, dst in tree.hops:
        if src not in has or dst in has or not 0 <= dst < num_sinks:
            raise WireError(f"a plan's tree has a hop from {src} to {dst} of {num_sinks} sinks after {sorted(has)}")
        has.add(dst)
    if tree.sinks != tuple(sorted(has - {SOURCE})):
        raise WireError(f"a plan's tree is for sinks {list(tree.sinks)}, but reaches {sorted(has - {SOURCE})}")


class _Version(msgspec.Struct):
    format_version: int


def encode_plan(plan: Plan) -> bytes:
    """MessagePack bytes of a plan. Equal plans give equal bytes."""
    return encode(plan)


def decode_plan(data: bytes) -> Plan:
    """Read a plan, strictly.

    Raises:
        FormatVersionError: written by another version of wsync.
        WireError: truncated, not a plan, unknown fields, wrong types, or references to what it does not contain.
    """
    # The version goes first: a newer plan's unknown fields should read as "newer", not as a typing error.
    check_format(decode(data, _Version).format_version, "the plan")
    plan = decode(data, Plan)
    _check_references(plan)
    return plan


def _check_references(plan: Plan) -> None:
    """Refuse a plan that points outside itself."""

    def check(what: str, value: int, count: int) -> None:
        if not 0 <= value < count:
            raise WireError(f"a plan refers to {what} {value} of {count}")

    if plan.bucket_bytes < ALIGNMENT or plan.bucket_bytes % ALIGNMENT:
        raise WireError(f"a plan's bucket_bytes is {plan.bucket_bytes}, allowed are multiples of {ALIGNMENT}")
    numbered = 0
    for flow in plan.flows:
        check("trainer rank", flow.src_rank, plan.num_sources)
        check("stage", flow.stage, 2)
        check("tree", flow.tree_idx, len(plan.trees))
        if flow.first_bucket < numbered:
            raise WireError(f"a plan's flow begins at bucket {flow.first_bucket}, the one before ends at {numbered}")
        numbered = flow.first_bucket + plan.num_buckets(flow)
        for entry in flow.entries:
            check("class", entry.class_idx, len(plan.classes))
            cls = plan.classes[entry.class_idx]
            check("unit", entry.unit_idx, len(cls.units))
            check("member", entry.first, len(cls.members))
            check("member", entry.end - 1, len(cls.members))
            check("first member", entry.first, entry.end)
    for tree in plan.trees:
        _check_tree(tree, plan.num_sinks)
    for cls in plan.classes:
        for tensor_idx in cls.members:
            check("tensor", tensor_idx, len(plan.names))
        for group_idx in cls.groups:
            check("scale group", group_idx, len(plan.scale_groups))
        for unit in cls.units:
            check("part", unit.part, len(cls.parts))
        for rank, _, _ in cls.amax:
            check("trainer rank", rank, plan.num_sources)
    for group in plan.scale_groups:
        for tensor_idx in group.tensors:
            check("tensor", tensor_idx, len(plan.names))
