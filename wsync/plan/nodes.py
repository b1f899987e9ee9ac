"""Which node each rank runs on, what it reaches from there, and what moving a byte costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.plan.places import (
    Lane,
    Port,
    Zones,
    check_gpu,
    find_islands,
    find_lanes,
    find_ports,
    find_zones,
    number_gpus,
)
from wsync.spec.cluster import Cluster, NodeGroup, default_cluster
from wsync.spec.manifest import DEVICE, HOST, RankInfo, SinkManifest, SourceManifest

ATTOSECONDS = 10**18
"""Loads are compared in whole attoseconds: a byte at 400 GB/s takes 2 500 000, and sums stay exact."""


def byte_cost(rate_gbps: float) -> int:
    """Attoseconds that one byte takes at ``rate_gbps``."""
    return max(1, round(ATTOSECONDS / (rate_gbps * 1e9)))


class Nic(NamedTuple):
    """One port of one node; ``slot`` counts those of the node, ``name`` is for reports."""

    node: int
    slot: int
    rate_gbps: float
    name: str


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, in order of first appearance (trainer ranks, then engine ranks).

    An *island* is what exchanges bytes without a NIC: a node, or the nodes of an NVLink domain that spans several. A
    *port* is a set of NICs that some rank reaches; a *zone* is what no shared link separates.

    Attributes:
        names: of the nodes.
        groups: of the nodes, for their rates.
        cluster: they belong to.
        source_node, sink_node: node index of each trainer rank and of each sink.
        local_cost: attoseconds that one byte takes between ranks of each node.
        sources, sinks: where each trainer rank and each sink is, and what it reaches.
        nics: of all nodes, each node's in order.
        ports: every set of NICs that a rank reaches.
        island: of each node.
        island_names: for messages and reports.
        zone: of each node.
        zones: how they are linked.
    """

    names: tuple[str, ...]
    groups: tuple[NodeGroup, ...]
    cluster: Cluster
    source_node: tuple[int, ...]
    sink_node: tuple[int, ...]
    local_cost: tuple[int, ...]
    sources: tuple[Lane, ...]
    sinks: tuple[Lane, ...]
    nics: tuple[Nic, ...]
    ports: tuple[Port, ...]
    island: tuple[int, ...]
    island_names: tuple[str, ...]
    zone: tuple[int, ...]
    zones: Zones

    @property
    def has_offloaded(self) -> bool:
        """Whether a trainer rank has its weights in host memory, beside a GPU."""
        return any(lane.offloaded for lane in self.sources)

    @property
    def has_in_host(self) -> bool:
        """Whether an engine rank keeps in host memory what it receives, beside a GPU."""
        return any(lane.in_host for lane in self.sinks)

    def on_device(self) -> Nodes:
        """The same job if every rank that runs on a GPU kept there what is synced."""
        sources = tuple(replace(lane, offloaded=False) for lane in self.sources)
        return replace(self, sources=sources, sinks=tuple(replace(lane, in_host=False) for lane in self.sinks))

    def sink_nic(self, sink_idx: int, rail: int) -> int:
        """Index into ``nics`` of the one that a sink sends or receives on for a hop of ``rail``."""
        reach = self.sinks[sink_idx].reach
        return reach[rail % len(reach)]


def check_place(what: str, info: RankInfo, group: NodeGroup | None) -> None:
    """Refuse one rank by itself that names a GPU which its node does not have.

    Args:
        what: the rank is, for the message.
        info: of the rank.
        group: of its node; None for a node that the cluster does not have.

    Raises:
        ConfigError: names it and the GPUs of the node.
    """
    if group is not None and group.num_gpus and info.gpu is not None:
        check_gpu(what, info.gpu, group)


def find_nodes(source: SourceManifest, sink: SinkManifest, cluster: Cluster | None) -> Nodes:
    """Map ranks to nodes by their hosts; without a cluster, `default_cluster` of those hosts.

    Raises:
        ConfigError: a host that the cluster does not have, a GPU that its node does not have, or a memory that is none.
    """
    infos: list[RankInfo] = [*source.ranks, *(r.info for r in sink.ranks)]
    count = len(source.ranks)
    hosts, gpus, memory = [i.host for i in infos], [i.gpu for i in infos], [i.memory for i in infos]
    return nodes_of(hosts[:count], hosts[count:], cluster, gpus[:count], gpus[count:], memory[:count], memory[count:])


def nodes_of(
    source_hosts: Sequence[str],
    sink_hosts: Sequence[str],
    cluster: Cluster | None = None,
    source_gpus: Sequence[int | None] | None = None,
    sink_gpus: Sequence[int | None] | None = None,
    source_memory: Sequence[str] | None = None,
    sink_memory: Sequence[str] | None = None,
) -> Nodes:
    """As `find_nodes`, from the host, the GPU and the memory of each trainer rank and of each sink."""
    names = tuple(dict.fromkeys([*source_hosts, *sink_hosts]))
    cluster = cluster or default_cluster(names)
    group_of = cluster.group_by_host(names)
    groups = tuple(group_of[n] for n in names)
    index = {n: i for i, n in enumerate(names)}
    source_node = tuple(index[h] for h in source_hosts)
    sink_node = tuple(index[h] for h in sink_hosts)
    nics = tuple(
        Nic(node, i, n.rate_gbps, f"nic {i} of node {names[node]}")
        for node, group in enumerate(groups)
        for i, n in enumerate(group.nics)
    )
    gpus = number_gpus(
        list(zip(source_node, source_gpus or [None] * len(source_node), strict=True)),
        list(zip(sink_node, sink_gpus or [None] * len(sink_node), strict=True)),
        groups,
    )
    sources, sinks = find_lanes(source_node, gpus[0], groups), find_lanes(sink_node, gpus[1], groups)
    sources = tuple(replace(x, offloaded=True) if h else x for x, h in _in_host("trainer rank", sources, source_memory))
    sinks = tuple(replace(x, in_host=True) if h else x for x, h in _in_host("sink", sinks, sink_memory))
    ports, (sources, sinks) = find_ports([n.rate_gbps for n in nics], sources, sinks)
    island, island_names = find_islands(names, groups, cluster)
    zone, zones = find_zones(groups, cluster)
    return Nodes(
        names,
        groups,
        cluster,
        source_node,
        sink_node,
        tuple(byte_cost(g.local_gbps) for g in groups),
        sources,
        sinks,
        nics,
        ports,
        island,
        island_names,
        zone,
        zones,
    )


def _in_host(what: str, lanes: Sequence[Lane], memory: Sequence[str] | None) -> Iterator[tuple[Lane, bool]]:
    """Each rank's lane, and whether it runs on a GPU and keeps in host memory what is synced."""
    for i, (lane, where) in enumerate(zip(lanes, memory or [DEVICE] * len(lanes), strict=True)):
        if where not in (DEVICE, HOST):
            raise ConfigError(f"{what} {i} keeps its weights in {where!r}, allowed are {DEVICE!r} and {HOST!r}")
        yield lane, where == HOST and lane.gpu >= 0
