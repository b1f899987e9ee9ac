"""The plan, factored by class: as small as the classes of tensors are few, whatever the number of tensors."""

from __future__ import annotations

from functools import cached_property

import msgspec

from wsync.errors import ConfigError, WireError
from wsync.plan.checks import (
    MAX_BYTES,
    MAX_RANKS,
    check_bucket_bytes,
    check_classes,
    check_flows,
    check_range,
    check_seconds,
    check_trees,
)
from wsync.plan.flows import Flow, Tree
from wsync.plan.names import Names
from wsync.plan.packing import BucketCounter
from wsync.plan.parts import PlanClass, PlanPart, PlanUnit, ScaleGroup
from wsync.plan.types import Bound
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.serde import check_format, decode, digest_of, encode

__all__ = [
    "RING_BUCKETS",
    "Plan",
    "PlanClass",
    "PlanPart",
    "PlanUnit",
    "ScaleGroup",
    "decode_plan",
    "encode_plan",
    "plan_digest",
]


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
_SHOWN_BYTES = 16
"""Of what is no plan, in messages: enough to know most kinds of files by."""


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ConfigError(f"{what} {index} is not in a plan of {count}")


def plan_digest(plan: Plan) -> str:
    """Hex digest of the whole plan; equal plans have equal digests on every machine."""
    return digest_of(plan)


class _Version(msgspec.Struct):
    format_version: int


def encode_plan(plan: Plan) -> bytes:
    """MessagePack bytes of a plan. Equal plans give equal bytes."""
    return encode(plan)


def decode_plan(data: bytes) -> Plan:
    """Read a plan, strictly.

    Raises:
        FormatVersionError: written by another version of wsync.
        WireError: truncated, not a plan, unknown fields, wrong types, sizes that cannot be, or references
            to what it does not contain.
    """
    # The version goes first: a newer plan's unknown fields should read as "newer", not as a typing error.
    check_format(_version_of(data), "the plan")
    plan = decode(data, Plan)
    _check_references(plan)
    return plan


def _version_of(data: bytes) -> int:
    try:
        return msgspec.msgpack.decode(data, type=_Version).format_version
    except (ValueError, RecursionError) as e:
        begin = f"{len(data)} bytes that begin with {data[:_SHOWN_BYTES]!r}" if data else "0 bytes"
        raise WireError(
            f"{begin} are no plan of wsync, or not the whole of one: read as MessagePack, {e}",
            hint="`wsync plan -o` writes a plan",
        ) from e


def _check_references(plan: Plan) -> None:
    """Refuse a plan that points outside itself, or whose sizes cannot be."""
    check_range("a plan's num_sources", plan.num_sources, 1, MAX_RANKS)
    check_range("a plan's num_sinks", plan.num_sinks, 1, MAX_RANKS)
    check_bucket_bytes(plan.bucket_bytes)
    check_range("a plan's needed_bytes", plan.needed_bytes, 0, MAX_BYTES)
    for what, seconds in (("time_s", plan.time_s), ("fill_s", plan.fill_s), ("amax_s", plan.amax_s)):
        check_seconds(f"a plan's {what}", seconds)
    for bound in plan.bounds:
        check_seconds(f"a plan's bound {bound.name!r}", bound.seconds)
    check_trees(plan.trees, plan.num_sinks)
    check_classes(
        plan.classes,
        plan.scale_groups,
        tensors=range(len(plan.names)),
        num_sources=plan.num_sources,
        bucket_bytes=plan.bucket_bytes,
        amax_elements=plan.amax_elements,
    )
    check_flows(plan.flows, plan.classes, len(plan.trees), plan.num_sources, plan.bucket_bytes)
