"""Seconds that a plan takes: the busiest part of the cluster, the filling of its pipelines, and the exchange of amaxes.

Source: the alpha-beta model of a message (Hockney), and for a chain of h hops with m buckets of b bytes
``(m + h - 1) (alpha + b / rate)``, of which the part that grows with m is a load and the rest is pipeline fill.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from wsync.errors import ConfigError
from wsync.plan.flows import LOCAL, Flow, Tree
from wsync.plan.loads import LinkLoad, Parts
from wsync.plan.nodes import Nodes
from wsync.plan.places import Lane, Place
from wsync.plan.types import SOURCE

__all__ = ["LinkLoad", "Times", "amax_s", "plan_times", "scan_s"]


@dataclass(frozen=True)
class Times:
    """Predicted seconds of a plan.

    Attributes:
        loads: of every part that carries bytes, the busiest first.
        fill_s: until the last rank of the deepest tree has received its first bucket, and the stages around the wire.
        amax_s: of the exchange of amaxes before packing.
    """

    loads: tuple[LinkLoad, ...]
    fill_s: float
    amax_s: float

    @property
    def busiest_s(self) -> float:
        """Seconds of the busiest part."""
        return self.loads[0].seconds if self.loads else 0.0

    @property
    def time_s(self) -> float:
        """Seconds of the whole plan."""
        return self.busiest_s + self.fill_s + self.amax_s


def plan_times(
    trees: Sequence[Tree],
    flows: Sequence[Flow],
    nodes: Nodes,
    bucket_bytes: int,
    *,
    amax_elements: int = 0,
    packed_bytes: Sequence[int] | None = None,
    host_bytes: Sequence[int] | None = None,
    scanned_bytes: Sequence[int] | None = None,
    flow_buckets: Sequence[int] | None = None,
) -> Times:
    """Predict the seconds of a plan.

    Args:
        trees: of the plan.
        flows: of the plan.
        nodes: of the job.
        bucket_bytes: size of a bucket.
        amax_elements: f32 elements of the vector that all trainer ranks exchange.
        packed_bytes: for each trainer rank the bytes that it reads and writes in GPU memory to pack.
        host_bytes: for each trainer rank the bytes of weights that it packs: what it brings to its GPU first if it is
            offloaded.
        scanned_bytes: for each trainer rank the bytes of weights whose amaxes it finds before; likewise.
        flow_buckets: messages of each flow; None for as few as hold its bytes, where flows have no pieces yet.

    Raises:
        ConfigError: trainer ranks that exchange amaxes cannot reach each other.
    """
    parts = Parts(nodes)
    sent: dict[tuple[int, int], list[int]] = {}
    counts = flow_buckets if flow_buckets is not None else [-(-f.nbytes // bucket_bytes) for f in flows]
    for flow, count in zip(flows, counts, strict=True):
        total = sent.setdefault((flow.src_rank, flow.tree_idx), [0, 0])
        total[0] += flow.wire_bytes
        total[1] += count
    by_tree: dict[int, list[int]] = {}
    first_hops = [_first_hops(tree, nodes) for tree in trees]
    largest = 0
    for (rank, tree_idx), (nbytes, messages) in sent.items():
        total = by_tree.setdefault(tree_idx, [0, 0])
        total[0] += nbytes
        total[1] += messages
        largest = max(largest, nbytes)
        parts.copy(nodes.sources[rank], nbytes)
        remote, local = first_hops[tree_idx]
        for (rail, zone), count in remote:
            parts.hop((True, rank, rail, zone), count * nbytes, count * messages)
        for dst in local:
            parts.hop((True, rank, LOCAL, dst), nbytes, messages)
    for tree_idx, (nbytes, messages) in by_tree.items():
        for (src, dst), rail in zip(trees[tree_idx].hops, trees[tree_idx].rails, strict=True):
            if rail != LOCAL:
                parts.arrive(dst, rail, nbytes)
            if src != SOURCE:
                where = dst if rail == LOCAL else nodes.zone[nodes.sink_node[dst]]
                parts.hop((False, src, rail, where), nbytes, messages)
        for dst in trees[tree_idx].sinks:
            parts.install(dst, nbytes)
    if host_bytes is not None:
        parts.gather(host_bytes)
    if packed_bytes is not None:
        parts.pack(packed_bytes)
    filled = min(bucket_bytes, largest)
    fill_s = max((_fill_s(trees[i], nodes, filled) for i in sorted(by_tree)), default=0.0)
    fill_s += parts.stage_s(filled) + _host_stage_s(nodes, filled, sent, host_bytes)
    return Times(parts.loads(), fill_s, scan_s(nodes, scanned_bytes) + amax_s(nodes, amax_elements))


def _host_stage_s(
    nodes: Nodes, bucket_bytes: int, sent: Mapping[tuple[int, int], Sequence[int]], host_bytes: Sequence[int] | None
) -> float:
    """What one bucket costs between host memory and GPUs, before it is packed and when it is installed."""
    wire = [0] * len(nodes.sources)
    for (rank, _), (nbytes, _) in sent.items():
        wire[rank] += nbytes
    gathers = [
        nbytes / wire[rank] / _pcie_gbps(nodes, nodes.source_node[rank])
        for rank, nbytes in enumerate(host_bytes or ())
        if nodes.sources[rank].offloaded and wire[rank]
    ]
    installs = [1 / _pcie_gbps(nodes, lane.node) for lane in nodes.sinks if lane.in_host]
    return bucket_bytes * (max(gathers, default=0.0) + max(installs, default=0.0)) / 1e9


def _pcie_gbps(nodes: Nodes, node: int) -> float:
    """Between host memory and one GPU of a node."""
    group = nodes.groups[node]
    return min(group.pcie_gbps or math.inf, 2 * group.host_gbps)


def scan_s(nodes: Nodes, scanned_bytes: Sequence[int] | None) -> float:
    """Seconds until offloaded trainer ranks have read over PCIe what they find amaxes of. From GPU memory it is taken
    to cost nothing."""
    by_gpu: Counter[Place] = Counter()
    by_node: Counter[int] = Counter()
    for lane, nbytes in zip(nodes.sources, scanned_bytes or [0] * len(nodes.sources), strict=True):
        if lane.offloaded:
            by_gpu[Place(lane.node, lane.gpu)] += nbytes
            by_node[lane.node] += nbytes
    seconds = [n / (_pcie_gbps(nodes, place.node) * 1e9) for place, n in by_gpu.items()]
    seconds += [n / (2 * nodes.groups[node].host_gbps * 1e9) for node, n in by_node.items()]
    return max(seconds, default=0.0)


def _first_hops(tree: Tree, nodes: Nodes) -> tuple[list[tuple[tuple[int, int], int]], list[int]]:
    """The sender's hops: how many of each rail and zone, and to which sinks of its own island."""
    remote: dict[tuple[int, int], int] = {}
    local = []
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        if src != SOURCE:
            continue
        if rail == LOCAL:
            local.append(dst)
        else:
            key = (rail, nodes.zone[nodes.sink_node[dst]])
            remote[key] = remote.get(key, 0) + 1
    return list(remote.items()), local


def amax_s(nodes: Nodes, num_elements: int) -> float:
    """Seconds of an all-reduce(max) of ``num_elements`` f32 among all trainer ranks: the better of ring and halving.

    Source: the costs of both algorithms in the alpha-beta model (Thakur et al., 2005).

    Raises:
        ConfigError: two nodes of trainer ranks have no path to each other; both are named.
    """
    ranks = len(nodes.sources)
    if not num_elements or ranks < 2:
        return 0.0
    moved_s = 2 * (ranks - 1) / ranks * 4 * num_elements / (_slowest_gbps(nodes) * 1e9)
    return moved_s + min(2 * (ranks - 1), 2 * math.ceil(math.log2(ranks))) * nodes.cluster.alpha_s


def _slowest_gbps(nodes: Nodes) -> float:
    """The narrowest place of a ring through all trainer ranks that enters every zone once."""
    used = list(dict.fromkeys(nodes.source_node))
    rates = [nodes.groups[n].local_gbps for n in used]
    domains = {(x.node, x.domain) for x in nodes.sources}
    rates += [nodes.groups[n].pcie_gbps or math.inf for n in used if sum(node == n for node, _ in domains) > 1]
    network: dict[int, list[float]] = {}
    for node in used:
        network.setdefault(nodes.island[node], []).append(nodes.groups[node].network_gbps)
    if len(network) > 1:
        _check_connected(nodes, used, {i for i, x in network.items() if not any(x)})
        count = Counter(nodes.island[n] for n in nodes.source_node)
        rates += [math.fsum(x) / count[i] for i, x in network.items()]
    zones = sorted({nodes.zone[n] for n in used})
    edges = Counter(i for a, b in zip(zones, [*zones[1:], zones[0]], strict=True) for i in nodes.zones.crossed[a][b])
    return min(*rates, *(nodes.cluster.links[i // 2].rate_gbps / n for i, n in edges.items()), math.inf)


def _check_connected(nodes: Nodes, used: Sequence[int], cut_off: Collection[int]) -> None:
    """Refuse trainer nodes of which some are on an island that no NIC leads to."""
    for node in used:
        if nodes.island[node] not in cut_off:
            continue
        other = next(n for n in used if nodes.island[n] != nodes.island[node])
        here, there = nodes.names[node], nodes.names[other]
        raise ConfigError(
            f"no path from node {here!r} to node {there!r}, whose trainer ranks exchange amaxes: group "
            f"{nodes.groups[node].name!r} has 0 nics",
            hint="give the group a nic, or hold all parts of a scale block on one node",
        )


def _fill_s(tree: Tree, nodes: Nodes, bucket_bytes: int) -> float:
    """Seconds from the arrival of the first bucket at the first rank until it is at the last one.

    A rank that passes a bucket on to several others makes one copy after the other. Trainer ranks do so too, but each
    begins with other sinks.
    """
    at: dict[int, float] = {}
    busy: dict[tuple[int, bool], float] = {}
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        if src == SOURCE:
            at[dst] = 0.0
            continue
        here, there = nodes.sinks[src], nodes.sinks[dst]
        if rail == LOCAL:
            rate = min(_local_gbps(nodes, here), _local_gbps(nodes, there))
        else:
            rate = min(nodes.nics[i].rate_gbps for i in (nodes.sink_nic(src, rail), nodes.sink_nic(dst, rail)))
        sent = busy.get((src, rail == LOCAL), at[src]) + bucket_bytes / (rate * 1e9)
        busy[(src, rail == LOCAL)] = sent
        at[dst] = sent + nodes.cluster.alpha_s
    return max(at.values())


def _local_gbps(nodes: Nodes, lane: Lane) -> float:
    return _pcie_gbps(nodes, lane.node) if lane.in_host else nodes.groups[lane.node].local_gbps
