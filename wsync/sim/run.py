"""simulate: a plan and a cluster in, seconds out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import msgspec

from wsync.errors import ConfigError
from wsync.plan.nodes import find_nodes
from wsync.plan.plans import Plan
from wsync.sim.engine import Resource
from wsync.sim.fabric import Fabric, some
from wsync.sim.faults import Faults
from wsync.sim.memory import memory_notes
from wsync.sim.model import build_work
from wsync.sim.options import Failure, SimOptions, Straggler, check_options
from wsync.sim.result import Event, ReplicaResult, ResourceUse, SimResult
from wsync.sim.sync import Replica, Sync
from wsync.spec.cluster import Cluster, check_cluster
from wsync.spec.manifest import SinkManifest, SourceManifest

SPANS = 2000
"""Busy times of one resource that are kept apart, about."""


class Simulation:
    """One update, before and after it is simulated.

    Args:
        plan, source, sink, cluster: as they were planned.
        options: of the simulation.
        spans: keep the busy times of resources, which charts and traces need and which takes time.

    Attributes:
        resources: with what they did.

    Raises:
        ConfigError: the options or the cluster cannot be, or name nodes, ports or replicas that are not there.
        PlanMismatchError: the plan is for other ranks.
    """

    def __init__(
        self,
        plan: Plan,
        source: SourceManifest,
        sink: SinkManifest,
        cluster: Cluster | None,
        options: SimOptions | None = None,
        *,
        spans: bool = False,
    ) -> None:
        self._options = options = options or SimOptions()
        check_options(options)
        if cluster is not None:
            check_cluster(cluster)
        source = options.source_of(source)
        nodes = find_nodes(source, sink, cluster)
        fabric = Fabric(nodes, {s.node: s.factor for s in options.stragglers}, options.host)
        for straggler in options.stragglers:
            fabric.node_index(straggler.node)
        self._plan = plan
        _check_without(options, sink)
        self._memory_notes = memory_notes(plan, source, sink, nodes, options)
        self._work = build_work(plan, source, sink, fabric)
        messages_s = 2 * nodes.cluster.alpha_s
        self._sync = Sync(
            self._work,
            in_place=options.install == "in_place",
            start_s=messages_s if options.start_s is None else options.start_s,
            vote_s=messages_s if options.vote_s is None else options.vote_s,
            merge_s=plan.time_s / SPANS if spans else None,
            jitter=options.jitter,
            seed=options.seed,
        )
        self._faults = Faults(self._sync, options.detect_s)
        for failure in options.failures:
            self._schedule(failure)
        self.resources: list[Resource] = fabric.resources

    def _schedule(self, failure: Failure) -> None:
        node = self._work.fabric.node_index(failure.node)
        if failure.nic is None:
            self._faults.schedule_node(node, failure.time_s)
        else:
            self._faults.schedule_port(node, failure.nic, failure.time_s)

    def run(self, name: str = "", plan_wall_s: float | None = None, published_s: float | None = None) -> SimResult:
        """Simulate, once.

        Args:
            name: of the scenario.
            plan_wall_s: that planning took.
            published_s: what a peer has published for the scenario.
        """
        begin = time.perf_counter()
        seconds = self._sync.run()
        wall_s = time.perf_counter() - begin
        plan, sync = self._plan, self._sync
        bound = plan.lower_bound_s
        no_score = _no_score(sync.replicas.values(), bound)
        late = (f"{words} at {t:g} s, after the end: this changed nothing" for t, words in self._faults.late)
        return SimResult(
            name=name,
            score=None if no_score or seconds is None else seconds / bound,
            no_score=no_score,
            simulated_s=seconds,
            horizon_s=sync.horizon_s,
            plan_s=plan.time_s,
            lower_bound_s=bound,
            binding_cut=plan.binding_cut,
            plan_wall_s=plan_wall_s,
            sim_wall_s=wall_s,
            stall_s=sync.times.packed_s,
            phases={
                "amax": sync.times.amax_s,
                "pack": sync.times.packed_s,
                "stage": sync.times.staged_s or None,
                "commit": seconds,
            },
            replicas=tuple(
                ReplicaResult(r.name, r.state, r.staged_s, r.commit_s, r.fault, r.dropped_s)
                for r in sync.replicas.values()
            ),
            resources=_uses(self.resources, sync.horizon_s),
            num_buckets=len(sync.buckets),
            num_hops=sum(len(b.stream.road.sinks) - 1 for b in sync.buckets),
            num_events=sync.engine.num_events,
            wire_bytes=sum(b.nbytes for b in sync.buckets),
            delivered_bytes=sum(b.nbytes * (b.have >> 1).bit_count() for b in sync.buckets),
            events=tuple(Event(t, words) for t, words in self._faults.log),
            resent=self._faults.resent,
            adopted=self._faults.adopted,
            notes=(*self._memory_notes, *late),
            seed=self._options.seed,
            published_s=published_s,
        )


def simulate(
    plan: Plan,
    source: SourceManifest,
    sink: SinkManifest,
    cluster: Cluster | None = None,
    *,
    stragglers: Sequence[Straggler] = (),
    failures: Sequence[Failure] = (),
    options: SimOptions | None = None,
    name: str = "",
) -> SimResult:
    """Simulate one update.

    Equal arguments give equal results, but for the wall times.

    Args:
        plan: of `make_plan`.
        source, sink, cluster: that it was made from.
        stragglers, failures: added to those of ``options``.
        options: of the simulation.
        name: of the scenario, for the result.

    Raises:
        ConfigError: the options or the cluster cannot be, or name nodes, ports or replicas that are not there.
        PlanMismatchError: the plan is for other ranks.
    """
    options = options or SimOptions()
    options = msgspec.structs.replace(
        options,
        stragglers=(*options.stragglers, *stragglers),
        failures=(*options.failures, *failures),
    )
    return Simulation(plan, source, sink, cluster, options).run(name)


def _check_without(options: SimOptions, sink: SinkManifest) -> None:
    """A plan has the replicas that it has: those that are not there had to be left out of the manifest."""
    names = list(dict.fromkeys(rank.replica for rank in sink.ranks))
    for name in options.without:
        if name in names:
            raise ConfigError(
                f"replica {name!r} should not be there, but the plan and the manifest have it",
                hint="make both without it; wsync simulate --without does so",
            )


def _no_score(replicas: Iterable[Replica], bound_s: float) -> str:
    """Why there is no score, or empty."""
    left = [r.name for r in replicas if r.commit_s is None]
    if left:
        return f"the bound is that of all replicas, and {len(left)} did not commit: {some(left)}"
    return "" if bound_s > 0 else "the bound is 0 s"


def _uses(resources: Sequence[Resource], seconds: float) -> tuple[ResourceUse, ...]:
    used = sorted((r for r in resources if r.services), key=lambda r: (-r.busy_s, r.name))
    return tuple(
        ResourceUse(
            r.name, r.kind, r.rate / 1e9, r.nbytes, r.services, r.busy_s, r.busy_s / seconds if seconds else 0.0
        )
        for r in used
    )
