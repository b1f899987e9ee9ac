"""The planner's own prediction for a topology: a plan over the cluster made of it, and what each link carries."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from wsync.errors import ConfigError, FormatVersionError, WireError
from wsync.plan import Plan, Planner, decode_plan
from wsync.plan.nodes import nodes_of
from wsync.plan.timing import LinkLoad, Times, plan_times
from wsync.spec.cluster import Cluster, NodeGroup
from wsync.spec.manifest import SinkManifest, SourceManifest

PLACEMENT_VERSION = 1
"""Version of ``wsync topo plan --json``."""


class Planned(msgspec.Struct, frozen=True):
    """A plan over a topology.

    Attributes:
        time_s: predicted.
        lower_bound_s: that no plan can beat.
        wire_bytes: that trainer ranks send, without padding, as reports of a publish count them.
        bound: the cut that the lower bound is of.
        links: what parts of the cluster carry, the busiest first; all of them.
    """

    time_s: float
    lower_bound_s: float
    bound: str
    wire_bytes: int
    links: tuple[LinkLoad, ...]


def read_plan(data: bytes, name: str) -> Plan:
    """An encoded plan.

    Raises:
        FormatVersionError: written by another version of wsync.
        ConfigError: truncated, or something else.
    """
    try:
        return decode_plan(data)
    except FormatVersionError:
        raise
    except WireError as e:
        raise ConfigError(f"{name} is no encoded plan: {e.message}", hint="`wsync plan -o` writes one") from e


def plan_on(source: SourceManifest, sink: SinkManifest, cluster: Cluster) -> Planned:
    """Plan over the cluster and say what its parts carry."""
    planner = Planner(source, cluster)
    plan = planner.plan(sink)
    return _judge(plan, planner.times(plan, sink))


def replay_on(plan: Plan, trainer: NodeGroup, engine: NodeGroup, cluster: Cluster) -> Planned:
    """Judge a plan that was made elsewhere: its ranks fill the nodes of each side in order.

    Raises:
        ConfigError: the nodes have fewer GPUs than the plan has ranks.
    """
    hosts = _fill(trainer, plan.num_sources, "trainer")
    sinks = _fill(engine, plan.num_sinks, "engine")
    return _judge(plan, plan_time(plan, hosts, sinks, cluster))


def plan_time(plan: Plan, hosts: Sequence[str], sinks: Sequence[str], cluster: Cluster) -> Times:
    """Times of a plan whose ranks run on these hosts; without what packing costs in memory, which no plan lists."""
    return plan_times(
        plan.trees,
        plan.flows,
        nodes_of(hosts, sinks, cluster),
        plan.bucket_bytes,
        amax_elements=plan.amax_elements,
        flow_buckets=plan.flow_buckets,
    )


def _fill(group: NodeGroup, num_ranks: int, side: str) -> list[str]:
    if num_ranks > group.count * group.num_gpus:
        raise ConfigError(
            f"the plan has {num_ranks} {side} ranks, {group.count} nodes of {group.num_gpus} GPUs have room for "
            f"{group.count * group.num_gpus}",
            hint="--nodes and --engine-nodes say how many there are",
        )
    return [group.node_names[i // group.num_gpus] for i in range(num_ranks)]


def _judge(plan: Plan, times: Times) -> Planned:
    return Planned(times.time_s, plan.lower_bound_s, plan.binding_cut, plan.wire_bytes, times.loads)
