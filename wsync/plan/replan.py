"""The planner: keeps what does not depend on who is there, so that a change of membership is planned at little cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wsync.errors import ConfigError, ManifestError
from wsync.plan.assemble import Parcels, make_flows
from wsync.plan.bucket_size import choose_bucket_bytes
from wsync.plan.classes import Classes, TensorClass, plan_classes
from wsync.plan.cuts import find_bounds
from wsync.plan.delta_size import Densities
from wsync.plan.demand import Boxes, Encodings, collect_demands
from wsync.plan.flows import DemandGroup, Flow, Lot, Routing, Tree
from wsync.plan.groups import OpenGroups, find_groups
from wsync.plan.holdings import Holdings, check_source
from wsync.plan.membership import Routed, patch
from wsync.plan.nodes import Nodes, find_nodes
from wsync.plan.plans import Plan, PlanClass, ScaleGroup
from wsync.plan.rank_classes import RankClasses, Sinks
from wsync.plan.route import route
from wsync.plan.timing import plan_times
from wsync.plan.types import ALIGNMENT, DEFAULT_BUCKET_BYTES, MAX_BUCKET_BYTES, PlanOptions
from wsync.spec.cluster import Cluster, check_cluster
from wsync.spec.manifest import SinkManifest, SinkRankManifest, SourceManifest
from wsync.spec.serde import FORMAT_VERSION

Router = Callable[[Sequence[DemandGroup], Nodes, int, PlanOptions], Routing]
"""Groups, nodes, bytes of a bucket and options in, trees and shares out: `wsync.plan.route.route` and its rivals."""

GOOD_SCORE = 1.05
"""A patched plan this near to its lower bound is kept as it is."""
_WORSE = 1.005
"""So is one that is not further from it, but for this factor, than the routing that it was made of."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known for one set of classes of engine ranks, however many ranks each of them has.

    Attributes:
        mask: of the classes.
        bucket_bytes: size of every bucket.
        classes, plan_classes: of tensors.
        scale_groups, amax_elements: of the exchanged vector.
        groups: of demand.
        needed_bytes: that each rank of a set of classes needs, by the mask of the set.
    """

    mask: int
    bucket_bytes: int
    classes: list[TensorClass]
    plan_classes: tuple[PlanClass, ...]
    scale_groups: tuple[ScaleGroup, ...]
    amax_elements: int
    groups: OpenGroups
    needed_bytes: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Last:
    """The plan before."""

    model: _Model
    router: Router
    routed: Routed


class Planner:
    """Plans for one source, again and again as engine replicas come and go.

    Args:
        source: what the trainer ranks hold.
        cluster: the machines; None for `default_cluster` of the hosts that the ranks name.
        options: None for the defaults.

    Raises:
        ManifestError: the source contradicts itself, or one of the leaves that `make_plan` names.
        ConfigError: the options or the cluster cannot be.
    """

    def __init__(
        self, source: SourceManifest, cluster: Cluster | None = None, options: PlanOptions | None = None
    ) -> None:
        self._options = options or PlanOptions()
        _check_options(self._options)
        if cluster is not None:
            check_cluster(cluster)
        self._cluster = cluster
        self._holdings: Holdings = check_source(source)
        self._names = tuple(t.name for t in source.tensors)
        self._densities = Densities(self._options.density)
        self._ranks = RankClasses()
        self._encodings = Encodings(Boxes())
        self._classes = Classes(self._holdings, self._encodings, self._densities)
        self._bucket_bytes = self._options.bucket_bytes
        self._checked: set[int] = set()
        self._model: _Model | None = None
        self._last: _Last | None = None

    def plan(self, sink: SinkManifest, router: Router = route, *, afresh: bool = False) -> Plan:
        """Plan for these engine ranks.

        Where the ranks take the same as those of the plan before, in however many replicas, that plan is patched: only
        delivery trees that have lost or won ranks change. All is routed again where the result would be further from
        its lower bound than `GOOD_SCORE` and than the last routing was.

        Args:
            sink: who is there now.
            router: decides who sends what along which trees; another one than wsync's own for comparison.
            afresh: as if nothing had been planned before.

        Raises:
            WsyncError: as `make_plan`; what was planned before stays as it is.
        """
        sinks, model, nodes = self._survey(sink)
        last = self._last
        patched: Plan | None = None
        if last is not None and last.model is model and last.router is router and not afresh:
            patched = self._patched(last.routed, model, sinks, nodes)
            if patched is not None and patched.score <= max(GOOD_SCORE, last.routed.score * _WORSE):
                return self._remembered(patched, model, sinks, nodes, router, last.routed.score)
        plan = self._routed(model, sinks, nodes, router)
        if patched is not None and patched.time_s < plan.time_s:
            plan = patched
        return self._remembered(plan, model, sinks, nodes, router, plan.score)

    def _remembered(self, plan: Plan, model: _Model, sinks: Sinks, nodes: Nodes, router: Router, score: float) -> Plan:
        self._last = _Last(model, router, Routed(sinks, nodes, plan.trees, plan.flows, score))
        return plan

    def _patched(self, before: Routed, model: _Model, sinks: Sinks, nodes: Nodes) -> Plan | None:
        found = patch(before, sinks, nodes, relay=self._options.relay)
        return None if found is None else self._finished(model, sinks, nodes, *found)

    def _routed(self, model: _Model, sinks: Sinks, nodes: Nodes, router: Router) -> Plan:
        groups = [g.with_sinks(sinks) for g in model.groups.free]
        routing = router(groups, nodes, model.bucket_bytes, self._options)
        parcels = Parcels(model.classes)
        parcels.share_out(groups, routing, model.groups)
        rest = parcels.follow(model.groups, sinks, nodes)
        trees = list(routing.trees)
        if rest:
            more = router([group for group, _ in rest], nodes, model.bucket_bytes, self._options)
            parcels.share_out_rest(rest, more, len(trees))
            trees += more.trees
        flows = make_flows(parcels.found, model.classes, model.bucket_bytes)
        return self._finished(model, sinks, nodes, tuple(trees), flows)

    def demand(self, sink: SinkManifest) -> list[DemandGroup]:
        """All demand groups of a plan, as bounds count them: what no plan can avoid. Raises as `plan`."""
        sinks, model, _ = self._survey(sink)
        return _all_groups(model, sinks)

    def bf16_bytes(self, sink: SinkManifest) -> list[int]:
        """For each group of `demand` its bytes if nothing were quantised: weights in 16 bits, no scales."""
        sinks, model, _ = self._survey(sink)
        return [sum(_bf16_bytes(model.classes[x.class_idx], x) for x in g.lots) for g in _all_groups(model, sinks)]

    def _survey(self, sink: SinkManifest) -> tuple[Sinks, _Model, Nodes]:
        if not sink.ranks:
            raise ManifestError("a plan needs at least 1 engine rank, got 0")
        _check_unique(sink)
        sinks = Sinks(sink, self._ranks)
        model = self._model_for(sinks)
        return sinks, model, find_nodes(self._holdings.source, sink, self._cluster)

    def _finished(
        self,
        model: _Model,
        sinks: Sinks,
        nodes: Nodes,
        trees: tuple[Tree, ...],
        flows: tuple[Flow, ...],
    ) -> Plan:
        times = plan_times(trees, flows, nodes, model.bucket_bytes, amax_elements=model.amax_elements)
        return Plan(
            format_version=FORMAT_VERSION,
            num_sources=len(self._holdings.source.ranks),
            num_sinks=len(sinks.manifest.ranks),
            bucket_bytes=model.bucket_bytes,
            names=self._names,
            classes=model.plan_classes,
            scale_groups=model.scale_groups,
            trees=trees,
            flows=flows,
            amax_elements=model.amax_elements,
            needed_bytes=sum(n * len(sinks.of(mask)) for mask, n in model.needed_bytes.items()),
            bounds=find_bounds(_all_groups(model, sinks), nodes, sinks.manifest, relay=self._options.relay),
            time_s=times.time_s,
            fill_s=times.fill_s,
            amax_s=times.amax_s,
            aliases=self._holdings.aliases,
        )

    def accept(self, rank: SinkRankManifest) -> SinkRankManifest:
        """Check one engine rank by itself, once for all that take the same.

        Returns:
            An equal manifest that shares what it can with those accepted before.

        Raises:
            WsyncError: as `make_plan` for this rank alone, without a cluster.
        """
        number = self._ranks.number(rank)
        if number not in self._checked:
            self._new_model(Sinks(SinkManifest((rank,)), self._ranks), self._bucket_bytes or DEFAULT_BUCKET_BYTES)
            self._checked.add(number)
        return self._ranks.shared(rank)

    def _model_for(self, sinks: Sinks) -> _Model:
        if self._model is None or self._model.mask != sinks.mask:
            self._model = self._new_model(sinks, self._bucket_bytes)
            self._bucket_bytes = self._model.bucket_bytes
        return self._model

    def _new_model(self, sinks: Sinks, bucket_bytes: int | None) -> _Model:
        ranks = [(number, self._ranks.firsts[number]) for number in sorted(sinks.by_class)]
        demands = collect_demands(self._holdings, ranks, self._encodings)
        members = self._classes.group(demands)
        if bucket_bytes is None:
            bucket_bytes = choose_bucket_bytes(members, self._encodings.boxes.values, sinks, self._cluster)
        classes = self._classes.intersect(members, bucket_bytes, sinks.first)
        made, scale_groups, elements = plan_classes(classes, self._holdings.target_of)
        return _Model(
            sinks.mask,
            bucket_bytes,
            classes,
            made,
            scale_groups,
            elements,
            find_groups(classes),
            _needed_bytes(classes),
        )


def _all_groups(model: _Model, sinks: Sinks) -> list[DemandGroup]:
    """The groups that are routed, and then the scales that follow weights: any holder may send them."""
    lots: dict[tuple[tuple[int, ...], int], list[Lot]] = {}
    for class_idx, unit_idx in model.groups.following:
        cls = model.classes[class_idx]
        unit = cls.blocks.units[unit_idx]
        key = (tuple(rank for rank, _ in unit.holders), cls.needers(unit))
        lots.setdefault(key, []).append(Lot(class_idx, unit_idx, cls.wire_bytes(unit), len(cls.members)))
    following = [
        DemandGroup(ranks, sinks.of(needers), 1, tuple(found), sum(x.nbytes * x.num_members for x in found))
        for (ranks, needers), found in lots.items()
    ]
    return [*(g.with_sinks(sinks) for g in model.groups.free), *following]


def _bf16_bytes(cls: TensorClass, lot: Lot) -> int:
    unit, recipe = cls.blocks.units[lot.unit_idx], cls.members[0].encoding.recipe
    if not recipe.quantised:
        return unit.nbytes * lot.num_members
    return 2 * unit.box.num_elements * recipe.packed * lot.num_members if unit.part == 0 else 0


def _needed_bytes(classes: Sequence[TensorClass]) -> dict[int, int]:
    found: dict[int, int] = {}
    for cls in classes:
        for unit in cls.blocks.units:
            needers = cls.needers(unit)
            found[needers] = found.get(needers, 0) + unit.nbytes * len(cls.members)
    return found


def _check_unique(sink: SinkManifest) -> None:
    seen: dict[tuple[str, int], int] = {}
    for sink_idx, rank in enumerate(sink.ranks):
        other = seen.setdefault((rank.replica, rank.rank), sink_idx)
        if other != sink_idx:
            raise ManifestError(
                f"rank {rank.rank} of replica {rank.replica!r} is in the sink manifest twice, as sink {other} and as "
                f"sink {sink_idx}",
                hint="give each replica a name of its own",
            )


def _check_options(options: PlanOptions) -> None:
    size = options.bucket_bytes
    allowed = f"allowed are multiples of {ALIGNMENT} from {ALIGNMENT} to {MAX_BUCKET_BYTES}"
    if size is not None and (type(size) is not int or size % ALIGNMENT or not 0 < size <= MAX_BUCKET_BYTES):
        raise ConfigError(f"bucket_bytes is {size!r}, {allowed}, as an int")
    if not isinstance(options.relay, bool):
        raise ConfigError(f"relay is {options.relay!r}, allowed are True and False")
