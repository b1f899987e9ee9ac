"""A rank's slice of a plan: factored as the plan is while it travels, and expanded on the rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from wsync.errors import ConfigError, WireError
from wsync.plan.checks import MAX_RANKS, check_bucket_bytes, check_classes, check_flows, check_range, check_trees
from wsync.plan.expand import Expansion
from wsync.plan.flows import Entry, Flow, Tree
from wsync.plan.names import Names, pack_names, unpack_names
from wsync.plan.plans import Plan, PlanClass, ScaleGroup, plan_digest
from wsync.plan.types import SinkSlice, SourceSlice
from wsync.spec.serde import check_format


class CompactSlice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank has to do, factored by class. `expand_source` and `expand_sink` make buckets and pieces of it.

    Attributes:
        format_version: of this encoding.
        plan_digest: of the whole plan; ranks with different digests refuse each other.
        side: of the rank.
        index: trainer rank, or index of the engine rank in the plan.
        bucket_bytes: size of every bucket.
        tensors: indices of the tensors whose names are needed, ascending.
        names: of these tensors.
        classes: those that the rank uses, with the units and the exchanged boxes that it uses.
        scale_groups: those that the rank's tensors belong to.
        trees, flows: of the rank.
        amax_elements: of the exchanged vector.
        aliases: name of a tied tensor -> name of the tensor under which its bytes travel.
    """

    format_version: int
    plan_digest: str
    side: Literal["source", "sink"]
    index: int
    bucket_bytes: int
    tensors: tuple[int, ...]
    names: Names
    classes: tuple[PlanClass, ...]
    scale_groups: tuple[ScaleGroup, ...]
    trees: tuple[Tree, ...]
    flows: tuple[Flow, ...]
    amax_elements: int
    aliases: dict[str, str] = {}


def compact_source(plan: Plan, rank: int, digest: str | None = None) -> CompactSlice:
    """What trainer rank ``rank`` does.

    Args:
        plan: of all ranks.
        rank: of the trainer.
        digest: `plan_digest` of ``plan`` where the caller has it already.
    """
    _check_index("trainer rank", rank, plan.num_sources)
    maker = _Maker(plan)
    for class_idx in plan.amax_of_source[rank]:
        maker.use_class(class_idx)
    flows = [maker.flow(plan.flows[i]) for i in plan.flows_of_source[rank]]
    return maker.slice(digest or plan_digest(plan), "source", rank, flows, {})


def compact_sink(plan: Plan, sink_idx: int, digest: str | None = None) -> CompactSlice:
    """What sink ``sink_idx`` receives, relays and installs.

    Args:
        plan: of all ranks.
        sink_idx: position in the sink manifest.
        digest: `plan_digest` of ``plan`` where the caller has it already.
    """
    _check_index("sink", sink_idx, plan.num_sinks)
    maker = _Maker(plan)
    flows = [maker.flow(plan.flows[i]) for i in plan.flows_of_sink[sink_idx]]
    return maker.slice(digest or plan_digest(plan), "sink", sink_idx, flows, plan.aliases)


class _Maker:
    """Numbers what one rank uses in order of first use."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._classes: dict[int, int] = {}
        self._units: dict[int, dict[int, int]] = {}
        self._trees: dict[int, int] = {}

    def use_class(self, class_idx: int) -> int:
        return self._classes.setdefault(class_idx, len(self._classes))

    def flow(self, flow: Flow) -> Flow:
        entries = tuple(
            Entry(self.use_class(e.class_idx), self._use_unit(e.class_idx, e.unit_idx), e.shard_idx, e.first, e.end)
            for e in flow.entries
        )
        tree_idx = self._trees.setdefault(flow.tree_idx, len(self._trees))
        return Flow(flow.first_bucket, flow.src_rank, flow.stage, tree_idx, entries, flow.nbytes, flow.delta_bytes)

    def _use_unit(self, class_idx: int, unit_idx: int) -> int:
        used = self._units.setdefault(class_idx, {})
        return used.setdefault(unit_idx, len(used))

    def slice(
        self, digest: str, side: Literal["source", "sink"], index: int, flows: list[Flow], aliases: dict[str, str]
    ) -> CompactSlice:
        plan = self._plan
        groups: dict[int, int] = {}
        classes = []
        exchanged = plan.amax_of_source[index] if side == "source" else {}
        for class_idx in self._classes:
            cls = plan.classes[class_idx]
            units = tuple(cls.units[i] for i in self._units.get(class_idx, ()))
            numbers = tuple(groups.setdefault(g, len(groups)) for g in cls.groups)
            amax = exchanged.get(class_idx, ())
            classes.append(msgspec.structs.replace(cls, units=units, groups=numbers, amax=amax))
        tensors, names = self._names(groups)
        return CompactSlice(
            format_version=plan.format_version,
            plan_digest=digest,
            side=side,
            index=index,
            bucket_bytes=plan.bucket_bytes,
            tensors=tensors,
            names=names,
            classes=tuple(classes),
            scale_groups=tuple(plan.scale_groups[i] for i in groups),
            trees=tuple(plan.trees[i] for i in self._trees),
            flows=tuple(flows),
            amax_elements=plan.amax_elements,
            aliases=aliases,
        )

    def _names(self, groups: Iterable[int]) -> tuple[tuple[int, ...], Names]:
        """The tensors that are named, and their names. Ranks that use the same classes share them."""
        plan = self._plan
        key = tuple(sorted(self._classes))
        found = plan.packed_names.get(key)
        if found is None:
            tensors = {i for class_idx in key for i in plan.classes[class_idx].members}
            tensors.update(i for group_idx in groups for i in plan.scale_groups[group_idx].tensors)
            ordered = tuple(sorted(tensors))
            found = plan.packed_names[key] = ordered, pack_names([plan.names[i] for i in ordered])
        return found


def expand_source(compact: CompactSlice) -> SourceSlice:
    """The buckets, pieces and exchanged boxes of a trainer rank.

    Raises:
        FormatVersionError: a slice of another version of wsync.
        WireError: a slice for the other side, of sizes that cannot be, or with references to what it does not contain.
    """
    expansion = _expansion(compact, "source")
    buckets = expansion.buckets(compact.flows, compact.trees)
    regions = expansion.regions(compact.index)
    parts = tuple(expansion.parts)
    digest, size = compact.plan_digest, compact.bucket_bytes
    return SourceSlice(digest, compact.index, size, parts, buckets, regions, compact.amax_elements)


def expand_sink(compact: CompactSlice) -> SinkSlice:
    """The buckets and pieces of an engine rank.

    Raises:
        FormatVersionError: a slice of another version of wsync.
        WireError: a slice for the other side, of sizes that cannot be, or with references to what it does not contain.
    """
    expansion = _expansion(compact, "sink")
    buckets = expansion.buckets(compact.flows, compact.trees)
    parts = tuple(expansion.parts)
    return SinkSlice(compact.plan_digest, compact.index, compact.bucket_bytes, parts, buckets, compact.aliases)


def _expansion(compact: CompactSlice, side: str) -> Expansion:
    check_format(compact.format_version, "the slice")
    if compact.side != side:
        raise WireError(f"a slice for a {side} was expected, one for a {compact.side} came")
    names = unpack_names(compact.names)
    _check_references(compact, len(names))
    return Expansion(
        compact.classes, compact.scale_groups, dict(zip(compact.tensors, names, strict=True)), compact.bucket_bytes
    )


def _check_references(compact: CompactSlice, num_names: int) -> None:
    """Refuse a slice that points outside itself, or whose sizes cannot be."""
    check_range("the index of a slice", compact.index, 0, MAX_RANKS - 1)
    check_bucket_bytes(compact.bucket_bytes)
    if len(compact.tensors) != num_names:
        raise WireError(f"a slice has {len(compact.tensors)} tensors, but {num_names} names")
    for before, tensor_idx in zip((-1, *compact.tensors), compact.tensors, strict=False):
        if tensor_idx <= before:
            raise WireError(f"a slice lists tensor {tensor_idx} after {before}, allowed is ascending order from 0")
    check_trees(compact.trees, MAX_RANKS)
    check_classes(
        compact.classes,
        compact.scale_groups,
        tensors=compact.tensors,
        num_sources=MAX_RANKS,
        bucket_bytes=compact.bucket_bytes,
        amax_elements=compact.amax_elements,
    )
    check_flows(compact.flows, compact.classes, len(compact.trees), MAX_RANKS, compact.bucket_bytes)
    _check_owner(compact)


def _check_owner(compact: CompactSlice) -> None:
    """Refuse a slice with what another rank does."""
    for flow in compact.flows:
        if compact.side == "source" and flow.src_rank != compact.index:
            raise WireError(f"a slice for trainer rank {compact.index} has a flow of trainer rank {flow.src_rank}")
    for tree in compact.trees:
        if compact.side == "sink" and compact.index not in tree.sinks:
            raise WireError(f"a slice for sink {compact.index} has a tree for sinks {list(tree.sinks)}")


def source_slice(plan: Plan, rank: int, digest: str | None = None) -> SourceSlice:
    """What trainer rank ``rank`` does, expanded. See `compact_source`."""
    return expand_source(compact_source(plan, rank, digest))


def sink_slice(plan: Plan, sink_idx: int, digest: str | None = None) -> SinkSlice:
    """What sink ``sink_idx`` receives, relays and installs, expanded. See `compact_sink`."""
    return expand_sink(compact_sink(plan, sink_idx, digest))


def source_slices(plan: Plan) -> list[SourceSlice]:
    """The expanded slices of all trainer ranks."""
    digest = plan_digest(plan)
    return [source_slice(plan, rank, digest) for rank in range(plan.num_sources)]


def sink_slices(plan: Plan) -> list[SinkSlice]:
    """The expanded slices of all sinks."""
    digest = plan_digest(plan)
    return [sink_slice(plan, sink_idx, digest) for sink_idx in range(plan.num_sinks)]


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ConfigError(f"{what} {index} is not in a plan of {count}")
