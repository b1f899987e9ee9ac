"""Cuts of the cluster that no plan can beat, and the time of this plan. The only floats of the planner.

Source: the max-flow min-cut argument. For a set of nodes, bytes that have a needer and no holder inside must enter it,
and bytes that have all holders inside and a needer outside must leave it, each at least once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wsync.errors import ConfigError
from wsync.plan.flows import DemandGroup, Flow, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.types import SOURCE, Bound
from wsync.spec.manifest import SinkManifest


@dataclass
class _Bytes:
    """Bytes by where they have to pass, or do pass."""

    num_nodes: int
    num_sources: int
    num_sinks: int
    num_links: int
    node_in: list[int] = field(init=False)
    node_out: list[int] = field(init=False)
    node_memory: list[int] = field(init=False)
    source_out: list[int] = field(init=False)
    sink_in: list[int] = field(init=False)
    link: list[list[int]] = field(init=False)
    crossings: int = 0
    leaves_trainers: int = 0
    enters_engines: int = 0

    def __post_init__(self) -> None:
        self.node_in, self.node_out, self.node_memory = ([0] * self.num_nodes for _ in range(3))
        self.source_out, self.sink_in = [0] * self.num_sources, [0] * self.num_sinks
        self.link = [[0, 0] for _ in range(self.num_links)]


def find_bounds(groups: Iterable[DemandGroup], nodes: Nodes, sink: SinkManifest) -> tuple[Bound, ...]:
    """Every cut that is looked at, the slowest first.

    Raises:
        ConfigError: bytes must cross the edge of a node that has no ports.
    """
    total = _least_bytes(groups, nodes)
    _check_ports(nodes, total.node_in, total.node_out)
    trainers, engines = set(nodes.source_node), set(nodes.sink_node)
    bounds: list[Bound] = []

    def add(name: str, nbytes: int, rate_gbps: float) -> None:
        if nbytes:
            bounds.append(Bound(name, nbytes / (rate_gbps * 1e9)))

    network = [g.network_gbps for g in nodes.groups]
    for i, name in enumerate(nodes.names):
        add(f"ingress of node {name}", total.node_in[i], network[i])
        add(f"egress of node {name}", total.node_out[i], network[i])
        if not nodes.groups[i].num_gpus:
            add(f"host memory of node {name}", total.node_memory[i], nodes.groups[i].host_gbps)
    if len(trainers) > 1:
        add("egress of all trainer nodes", total.leaves_trainers, sum(network[i] for i in sorted(trainers)))
    if len(engines) > 1:
        add("ingress of all engine nodes", total.enters_engines, sum(network[i] for i in sorted(engines)))
    add("traffic between nodes", total.crossings, sum(network[i] for i in sorted(trainers | engines)))
    for rank, nbytes in enumerate(total.source_out):
        add(f"egress of trainer rank {rank}", nbytes, nodes.groups[nodes.source_node[rank]].local_gbps)
    for i, info in enumerate(sink.ranks):
        local = nodes.groups[nodes.sink_node[i]].local_gbps
        add(f"install on rank {info.rank} of replica {info.replica}", total.sink_in[i], local)
    for link, (forth, back) in zip(nodes.cluster.links, total.link, strict=True):
        add(f"link {link.name} from {'+'.join(link.side_a)}", forth, link.rate_gbps)
        add(f"link {link.name} from {'+'.join(link.side_b)}", back, link.rate_gbps)
    return tuple(sorted(bounds, key=lambda b: (-b.seconds, b.name)))


def _least_bytes(groups: Iterable[DemandGroup], nodes: Nodes) -> _Bytes:
    total = _Bytes(len(nodes.names), len(nodes.source_node), len(nodes.sink_node), len(nodes.cluster.links))
    trainers, engines = set(nodes.source_node), set(nodes.sink_node)
    sides = _sides(nodes)
    covers = [a | b == {g.name for g in nodes.cluster.groups} for a, b in _link_groups(nodes)]
    for group in groups:
            nbytes, sinks = group.nbytes, group.sinks
            held = {nodes.source_node[rank] for rank in group.holders}
            needed = {nodes.sink_node[s] for s in sinks}
            for s in sinks:
                total.sink_in[s] += nbytes
                total.node_memory[nodes.sink_node[s]] += nbytes
            for node in needed - held:
                total.node_in[node] += nbytes
            total.crossings += nbytes * len(needed - held)
            if len(held) == 1:
                (node,) = held
                total.node_memory[node] += nbytes
                total.node_out[node] += nbytes * bool(needed - held)
            if len(group.holders) == 1:
                total.source_out[group.holders[0]] += nbytes
            total.leaves_trainers += nbytes * bool(needed - trainers)
            total.enters_engines += nbytes * (not held & engines)
            for i, (a, b) in enumerate(sides):
                # With a third side the bytes might go round the link.
                if covers[i]:
                    total.link[i][0] += nbytes * bool(held <= a and needed & b)
                    total.link[i][1] += nbytes * bool(held <= b and needed & a)
    return total


def _link_groups(nodes: Nodes) -> list[tuple[set[str], set[str]]]:
    return [(set(link.side_a), set(link.side_b)) for link in nodes.cluster.links]


def _sides(nodes: Nodes) -> list[tuple[set[int], set[int]]]:
    """The nodes on either side of each link."""
    out = []
    for a, b in _link_groups(nodes):
        side_a = {i for i, g in enumerate(nodes.groups) if g.name in a}
        out.append((side_a, {i for i, g in enumerate(nodes.groups) if g.name in b}))
    return out


def _check_ports(nodes: Nodes, *crossing: list[int]) -> None:
    for per_node in crossing:
        for i, nbytes in enumerate(per_node):
            if nbytes and not nodes.groups[i].nics:
                raise ConfigError(
                    f"{nbytes} bytes must cross the edge of node {nodes.names[i]!r}, but its group "
                    f"{nodes.groups[i].name!r} has 0 nics"
                )


def plan_seconds(trees: Sequence[Tree], flows: Iterable[Flow], nodes: Nodes, bucket_bytes: int) -> float:
    """Seconds that the busiest part of the cluster takes, with alpha for every message of a rank.

    Raises:
        ConfigError: bytes are routed over the edge of a node that has no ports.
    """
    total = _Bytes(len(nodes.names), len(nodes.source_node), len(nodes.sink_node), len(nodes.cluster.links))
    relayed = [0] * len(nodes.sink_node)
    messages = [0] * (len(nodes.source_node) + len(nodes.sink_node))
    sides = _sides(nodes)
    for flow in flows:
        used, home = flow.wire_bytes, nodes.source_node[flow.src_rank]
        count = -(-flow.nbytes // bucket_bytes)
        total.node_memory[home] += used
        for src, dst in trees[flow.tree_idx].hops:
            src_node, dst_node = (home if src == SOURCE else nodes.sink_node[src]), nodes.sink_node[dst]
            total.sink_in[dst] += used
            total.node_memory[dst_node] += used
            if src == SOURCE:
                total.source_out[flow.src_rank] += used
                messages[flow.src_rank] += count
            else:
                relayed[src] += used
                messages[len(nodes.source_node) + src] += count
            if src_node != dst_node:
                total.node_out[src_node] += used
                total.node_in[dst_node] += used
                for i, (a, b) in enumerate(sides):
                    total.link[i][0] += used * (src_node in a and dst_node in b)
                    total.link[i][1] += used * (src_node in b and dst_node in a)
    _check_ports(nodes, total.node_in, total.node_out)
    return _slowest(total, relayed, messages, nodes)


def _slowest(total: _Bytes, relayed: list[int], messages: list[int], nodes: Nodes) -> float:
    times = [0.0]
    for i, group in enumerate(nodes.groups):
        if group.nics:
            times += [n / (group.network_gbps * 1e9) for n in (total.node_in[i], total.node_out[i])]
        if not group.num_gpus:
            times.append(total.node_memory[i] / (group.host_gbps * 1e9))
    alpha_s = nodes.cluster.alpha_s
    for rank, node in enumerate(nodes.source_node):
        times.append(total.source_out[rank] / (nodes.groups[node].local_gbps * 1e9) + messages[rank] * alpha_s)
    for i, node in enumerate(nodes.sink_node):
        rate = nodes.groups[node].local_gbps * 1e9
        sent_s = relayed[i] / rate + messages[len(nodes.source_node) + i] * alpha_s
        times += [total.sink_in[i] / rate, sent_s]
    for link, directions in zip(nodes.cluster.links, total.link, strict=True):
        times += [n / (link.rate_gbps * 1e9) for n in directions]
    return max(times)
