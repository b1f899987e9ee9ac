"""The planner: keeps what does not depend on who is there, so that a change of membership is planned at little cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from wsync.errors import ConfigError, ManifestError, WsyncError
from wsync.plan.assemble import Parcels, make_flows
from wsync.plan.bucket_size import choose_bucket_bytes
from wsync.plan.classes import TensorClass
from wsync.plan.cuts import find_bounds
from wsync.plan.delta_size import Densities
from wsync.plan.flows import DemandGroup, Flow, Lot, Routing, Tree
from wsync.plan.holdings import Holdings, check_source
from wsync.plan.membership import Routed, patch
from wsync.plan.model import Model, Models
from wsync.plan.nodes import Nodes, check_place, find_nodes
from wsync.plan.plans import Plan
from wsync.plan.rank_classes import RankClasses, Sinks, mask_of
from wsync.plan.route import route
from wsync.plan.timing import Times, plan_times
from wsync.plan.types import ALIGNMENT, DEFAULT_BUCKET_BYTES, MAX_BUCKET_BYTES, PlanOptions
from wsync.spec.cluster import Cluster, check_cluster
from wsync.spec.manifest import SinkManifest, SinkRankManifest, SourceManifest
from wsync.spec.serde import FORMAT_VERSION

Router = Callable[[Sequence[DemandGroup], Nodes, int, PlanOptions], Routing]
"""Groups, nodes, bytes of a bucket and options in, trees and shares out: `wsync.plan.route.route` and its rivals."""

GOOD_SCORE = 1.05
"""A patched plan this near to its lower bound is kept as it is."""
_WORSE = 1.005
"""So is one of a large job that is not further from it, but for this factor, than the routing that it was made of."""
_CHEAP = 20_000
"""Groups times engine ranks of a job that is routed again at once where its patched plan is not good."""
_OTHER_SIZE = 4
"""Buckets keep their size until another one is better by this factor."""


@dataclass(frozen=True, slots=True)
class _Last:
    """The plan before."""

    model: Model
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
        self._group_of = {name: group for group in (cluster.groups if cluster else ()) for name in group.node_names}
        self._holdings: Holdings = check_source(source)
        self._names = tuple(t.name for t in source.tensors)
        self._ranks = RankClasses()
        self._models = Models(self._holdings, Densities(self._options.density))
        self._checked: set[int] = set()
        self._awaited = 0
        self._model: Model | None = None
        self._last: _Last | None = None

    def plan(self, sink: SinkManifest, router: Router = route, *, afresh: bool = False) -> Plan:
        """Plan for these engine ranks.

        Where the ranks take the same as those of the plan before, in however many replicas, that plan is patched: only
        delivery trees that have lost or won ranks change. All is routed again where the result would be further from
        its lower bound than `GOOD_SCORE`; in large jobs only if it is further than the last routing was, too, or if the
        fleet is much larger or smaller than then.

        Args:
            sink: who is there now.
            router: decides who sends what along which trees; another one than wsync's own for comparison.
            afresh: as if nothing had been planned before.

        Raises:
            WsyncError: as `make_plan`; what was planned before stays as it is.
        """
        try:
            plan = self._plan(sink, router, afresh=afresh)
        finally:
            self._keep(self._awaited)
        self._awaited = 0
        return plan

    def _plan(self, sink: SinkManifest, router: Router, *, afresh: bool) -> Plan:
        sinks, model, nodes = self._survey(sink)
        last = self._last
        patched: Plan | None = None
        if last is not None and last.model is model and last.router is router and not afresh:
            patched = self._patched(last.routed, model, sinks, nodes)
            if patched is not None and _is_good(patched, last.routed, len(model.groups.free)):
                return self._remembered(patched, model, sinks, nodes, router, last.routed)
        plan = self._routed(model, sinks, nodes, router)
        if patched is not None and patched.time_s < plan.time_s:
            plan = patched
        return self._remembered(plan, model, sinks, nodes, router, None)

    def _remembered(
        self, plan: Plan, model: Model, sinks: Sinks, nodes: Nodes, router: Router, before: Routed | None
    ) -> Plan:
        score, num_sinks = (before.score, before.num_sinks) if before else (plan.score, plan.num_sinks)
        self._last = _Last(model, router, Routed(sinks, nodes, plan.trees, plan.flows, score, num_sinks))
        return plan

    def _patched(self, before: Routed, model: Model, sinks: Sinks, nodes: Nodes) -> Plan | None:
        found = patch(before, sinks, nodes, relay=self._options.relay)
        return None if found is None else self._finished(model, sinks, nodes, *found)

    def _routed(self, model: Model, sinks: Sinks, nodes: Nodes, router: Router) -> Plan:
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
        return model.all_groups(sinks)

    def bf16_bytes(self, sink: SinkManifest) -> list[int]:
        """For each group of `demand` its bytes if nothing were quantised: weights in 16 bits, no scales."""
        sinks, model, _ = self._survey(sink)
        return [sum(_bf16_bytes(model.classes[x.class_idx], x) for x in g.lots) for g in model.all_groups(sinks)]

    def packed_bytes(self, sink: SinkManifest) -> list[int]:
        """For each group of `demand` what packing it once reads and writes in the memory of a trainer rank."""
        sinks, model, _ = self._survey(sink)
        return model.group_packed_bytes(model.all_groups(sinks))

    def host_bytes(self, sink: SinkManifest) -> list[int]:
        """For each group of `demand` the weights that packing it once reads: from host memory on an offloaded rank."""
        sinks, model, _ = self._survey(sink)
        return model.group_host_bytes(model.all_groups(sinks))

    def times(self, plan: Plan, sink: SinkManifest, nodes: Nodes | None = None) -> Times:
        """What every part of the cluster carries in the plan that this planner made for ``sink``, as it was timed.

        Args:
            plan: of this planner.
            sink: that it is for.
            nodes: as if ranks ran there, or kept there what is synced; None for where they do.
        """
        _, model, own = self._survey(sink)
        return _times(model, nodes or own, plan.trees, plan.flows)

    def _survey(self, sink: SinkManifest) -> tuple[Sinks, Model, Nodes]:
        if not sink.ranks:
            raise ManifestError("a plan needs at least 1 engine rank, got 0")
        _check_unique(sink)
        sinks = Sinks(sink, self._ranks)
        nodes = find_nodes(self._holdings.source, sink, self._cluster)
        return sinks, self._model_for(sinks, nodes), nodes

    def _finished(
        self,
        model: Model,
        sinks: Sinks,
        nodes: Nodes,
        trees: tuple[Tree, ...],
        flows: tuple[Flow, ...],
    ) -> Plan:
        times = _times(model, nodes, trees, flows)
        groups = model.all_groups(sinks)
        bounds = find_bounds(
            groups,
            nodes,
            sinks.manifest,
            relay=self._options.relay,
            packed_bytes=model.group_packed_bytes(groups),
            host_bytes=model.group_host_bytes(groups) if nodes.has_offloaded else None,
        )
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
            bounds=bounds,
            time_s=times.time_s,
            fill_s=times.fill_s,
            amax_s=times.amax_s,
            aliases=self._holdings.aliases,
        )

    def accept(self, rank: SinkRankManifest, live: Iterable[SinkRankManifest] | None = None) -> SinkRankManifest:
        """Check one engine rank by itself, once for all that take the same.

        Args:
            rank: to check.
            live: the ranks accepted before that may still be planned for: what is known of any others but those of the
                last plan is forgotten. None: whoever was accepted since the last plan.

        Returns:
            An equal manifest that shares what it can with those accepted before.

        Raises:
            WsyncError: as `make_plan` for this rank alone, without a cluster.
            ConfigError: it names a GPU that its node of the cluster does not have.
        """
        check_place(f"rank {rank.rank} of replica {rank.replica!r}", rank.info, self._group_of.get(rank.info.host))
        if live is not None:
            self._awaited = mask_of({n for n in map(self._ranks.find, live) if n is not None})
            self._keep(self._awaited)
        number = self._ranks.find(rank)
        if number not in self._checked:
            self._check(rank)
            number = self._ranks.number(rank)
            self._checked.add(number)
        self._awaited |= 1 << number
        return self._ranks.shared(rank)

    def _check(self, rank: SinkRankManifest) -> None:
        """Refuse a rank that nothing could be planned for, before it gets a number."""
        alone = RankClasses()
        size = self._options.bucket_bytes or (self._model.bucket_bytes if self._model else DEFAULT_BUCKET_BYTES)
        try:
            self._models.make(Sinks(SinkManifest((rank,)), alone), alone.firsts, lambda _: size)
        except WsyncError:
            self._models.gone(1)
            raise

    def _keep(self, mask: int) -> None:
        """Forget the classes of engine ranks that are neither of ``mask`` nor of the last model."""
        gone = self._ranks.keep(mask | (self._model.mask if self._model else 0))
        self._checked.difference_update(gone)
        self._models.gone(len(gone))

    def _model_for(self, sinks: Sinks, nodes: Nodes) -> Model:
        last = self._model
        if last is None or last.mask != sinks.mask:
            size = last.bucket_bytes if last else None
        elif self._is_fit(last.bucket_bytes, last.asked_bytes, sinks, nodes):
            return last
        else:
            size = None

        def bucket_bytes(asked_bytes: dict[int, int]) -> int:
            if size is not None and self._is_fit(size, asked_bytes, sinks, nodes):
                return size
            return self._best_size(asked_bytes, sinks, nodes)

        self._model = self._models.make(sinks, self._ranks.firsts, bucket_bytes)
        return self._model

    def _best_size(self, asked_bytes: dict[int, int], sinks: Sinks, nodes: Nodes) -> int:
        if self._options.bucket_bytes is not None:
            return self._options.bucket_bytes
        return DEFAULT_BUCKET_BYTES if self._cluster is None else choose_bucket_bytes(asked_bytes, sinks, nodes)

    def _is_fit(self, size: int, asked_bytes: dict[int, int], sinks: Sinks, nodes: Nodes) -> bool:
        """Whether another size would be hardly better: a change makes everything anew."""
        best = self._best_size(asked_bytes, sinks, nodes)
        return best < _OTHER_SIZE * size and size < _OTHER_SIZE * best


def _times(model: Model, nodes: Nodes, trees: Sequence[Tree], flows: Sequence[Flow]) -> Times:
    sizes = model.flow_sizes.of(flows)
    packed_bytes, host_bytes = [0] * len(nodes.sources), [0] * len(nodes.sources)
    for flow, size in zip(flows, sizes, strict=True):
        packed_bytes[flow.src_rank] += size.packed_bytes
        host_bytes[flow.src_rank] += size.host_bytes
    return plan_times(
        trees,
        flows,
        nodes,
        model.bucket_bytes,
        amax_elements=model.amax_elements,
        packed_bytes=packed_bytes,
        host_bytes=host_bytes,
        scanned_bytes=model.scanned_bytes(len(nodes.sources)) if nodes.has_offloaded else None,
        flow_buckets=[size.num_buckets for size in sizes],
    )


def _is_good(plan: Plan, routed: Routed, num_groups: int) -> bool:
    """Whether a patched plan is kept without a look at what a new routing would give."""
    if plan.score <= GOOD_SCORE:
        return True
    if num_groups * plan.num_sinks <= _CHEAP or plan.score > routed.score * _WORSE:
        return False
    # What a routing reached says little about a job of another size.
    return 4 * abs(plan.num_sinks - routed.num_sinks) <= routed.num_sinks


def _bf16_bytes(cls: TensorClass, lot: Lot) -> int:
    unit, recipe = cls.blocks.units[lot.unit_idx], cls.members[0].encoding.recipe
    if not recipe.quantised:
        return unit.nbytes * lot.num_members
    return 2 * unit.box.num_elements * recipe.packed * lot.num_members if unit.part == 0 else 0


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
