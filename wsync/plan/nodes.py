"""Which node each rank runs on, and what moving a byte costs there."""

from __future__ import annotations

from dataclasses import dataclass

from wsync.spec.cluster import Cluster, NodeGroup, default_cluster
from wsync.spec.manifest import RankInfo, SinkManifest, SourceManifest

ATTOSECONDS = 10**18
"""Loads are compared in whole attoseconds: a byte at 400 GB/s takes 2 500 000, and sums stay exact."""


def _cost(rate_gbps: float) -> int:
    return max(1, round(ATTOSECONDS / (rate_gbps * 1e9)))


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, in order of first appearance (trainer ranks, then engine ranks).

    Attributes:
        names: of the nodes.
        groups: of the nodes, for their rates.
        cluster: they belong to.
        source_node, sink_node: node index of each trainer rank and of each sink.
        network_cost, local_cost: attoseconds that one byte takes through the ports of a node, and between ranks of it.
    """

    names: tuple[str, ...]
    groups: tuple[NodeGroup, ...]
    cluster: Cluster
    source_node: tuple[int, ...]
    sink_node: tuple[int, ...]
    network_cost: tuple[int, ...]
    local_cost: tuple[int, ...]


def find_nodes(source: SourceManifest, sink: SinkManifest, cluster: Cluster | None) -> Nodes:
    """Map ranks to nodes by their hosts; without a cluster, `default_cluster` of those hosts.

    Raises:
        ConfigError: a host that the cluster does not have.
    """
    infos: list[RankInfo] = [*source.ranks, *(r.info for r in sink.ranks)]
    names = tuple(dict.fromkeys(i.host for i in infos))
    cluster = cluster or default_cluster(names)
    group_of = cluster.group_by_host(names)
    groups = tuple(group_of[n] for n in names)
    index = {n: i for i, n in enumerate(names)}
    node_of = [index[i.host] for i in infos]
    # A node without ports is never chosen to send to others where any other holder exists.
    network = tuple(_cost(g.network_gbps) if g.nics else ATTOSECONDS for g in groups)
    return Nodes(
        names,
        groups,
        cluster,
        tuple(node_of[: len(source.ranks)]),
        tuple(node_of[len(source.ranks) :]),
        network,
        tuple(_cost(g.local_gbps) for g in groups),
    )
