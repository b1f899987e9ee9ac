"""Hand-made demand groups on named hosts, for the tests of peers' policies."""

from __future__ import annotations

from wsync.plan.flows import DemandGroup, Lot
from wsync.plan.nodes import Nodes, find_nodes
from wsync.plan.types import SOURCE
from wsync.spec.cluster import Cluster, Nic, NodeGroup
from wsync.spec.manifest import RankInfo, SinkManifest, SinkRankManifest, SourceManifest

NIC_GBPS = 50.0


def nodes_of(source_hosts, sink_hosts, gpus=2):
    """Nodes of ``gpus`` GPUs and as many NICs, one rank after the other on ``source_hosts`` and ``sink_hosts``."""
    hosts = tuple(dict.fromkeys([*source_hosts, *sink_hosts]))
    group = NodeGroup(
        "node",
        len(hosts),
        400.0,
        hosts=hosts,
        num_gpus=gpus,
        hbm_gbps=3000.0,
        pcie_gbps=55.0,
        nvlink_gbps=450.0,
        nvlink_domain=gpus,
        nics=tuple(Nic(NIC_GBPS, i) for i in range(gpus)),
    )
    source = SourceManifest(tuple(RankInfo(h) for h in source_hosts), (), ())
    ranks = tuple(SinkRankManifest("r", i, len(sink_hosts), RankInfo(h), {}, (), ()) for i, h in enumerate(sink_hosts))
    return find_nodes(source, SinkManifest(ranks), Cluster((group,)))


def group_of(holders, sinks, nbytes=100, num_members=1, class_idx=0):
    lot = Lot(class_idx, 0, nbytes, num_members)
    return DemandGroup(tuple(holders), tuple(sinks), 0, (lot,), nbytes * num_members)


def received(moves, group_idx):
    """Bytes of a group that each sink receives; every sender of a hop has received before."""
    out = {}
    for route in moves.routing.routes[group_idx]:
        for share in route.shares:
            tree = moves.routing.trees[share.tree_idx]
            has = {SOURCE}
            for src, dst in tree.hops:
                assert src in has
                assert dst not in has
                has.add(dst)
                out[dst] = out.get(dst, 0) + share.nbytes
            assert tree.sinks == tuple(sorted(has - {SOURCE}))
            assert len(tree.rails) == len(tree.hops)
    return out


def sent(moves):
    """Bytes that leave each trainer rank for engine ranks, by the sinks that it sends to itself."""
    out = {}
    for routes in moves.routing.routes:
        for route in routes:
            for share in route.shares:
                for src, dst in moves.routing.trees[share.tree_idx].hops:
                    if src == SOURCE:
                        out[(share.src_rank, dst)] = out.get((share.src_rank, dst), 0) + share.nbytes
    return out


def entering(moves, nodes: Nodes):
    """Bytes that enter each node from others."""
    out = {}
    for routes in moves.routing.routes:
        for route in routes:
            for share in route.shares:
                for src, dst in moves.routing.trees[share.tree_idx].hops:
                    at = nodes.source_node[share.src_rank] if src == SOURCE else nodes.sink_node[src]
                    if at != nodes.sink_node[dst]:
                        name = nodes.names[nodes.sink_node[dst]]
                        out[name] = out.get(name, 0) + share.nbytes
    return out
