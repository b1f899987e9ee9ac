"""Seconds that a plan takes: the busiest part of the cluster, the filling of its pipelines, and the exchange of amaxes.

Source: the alpha-beta model of a message (Hockney), and for a chain of h hops with m buckets of b bytes
``(m + h - 1) (alpha + b / rate)``, of which the part that grows with m is a load and the rest is pipeline fill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from wsync.plan.flows import LOCAL, Flow, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.places import Lane
from wsync.plan.types import SOURCE


class LinkLoad(msgspec.Struct, frozen=True, array_like=True):
    """What one part of the cluster carries.

    Attributes:
        name: of the part, with the direction.
        nbytes: through it.
        seconds: that this takes it, with alpha for the messages of a rank.
    """

    name: str
    nbytes: int
    seconds: float


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
) -> Times:
    """Predict the seconds of a plan.

    Args:
        trees: of the plan.
        flows: of the plan.
        nodes: of the job.
        bucket_bytes: size of a bucket.
        amax_elements: f32 elements of the vector that all trainer ranks exchange.
        packed_bytes: for each trainer rank the bytes that it reads and writes in GPU memory to pack.
    """
    parts = _Parts(nodes)
    sent: dict[tuple[int, int], list[int]] = {}
    for flow in flows:
        total = sent.setdefault((flow.src_rank, flow.tree_idx), [0, 0])
        total[0] += flow.wire_bytes
        total[1] += -(-flow.nbytes // bucket_bytes)
    by_tree: dict[int, list[int]] = {}
    largest = 0
    for (rank, tree_idx), (nbytes, messages) in sent.items():
        total = by_tree.setdefault(tree_idx, [0, 0])
        total[0] += nbytes
        total[1] += messages
        largest = max(largest, nbytes)
        parts.copy(nodes.sources[rank], nbytes)
        for (src, dst), rail in zip(trees[tree_idx].hops, trees[tree_idx].rails, strict=True):
            if src == SOURCE:
                parts.hop(True, rank, dst, rail, nbytes, messages)
    for tree_idx, (nbytes, messages) in by_tree.items():
        for (src, dst), rail in zip(trees[tree_idx].hops, trees[tree_idx].rails, strict=True):
            if src != SOURCE:
                parts.hop(False, src, dst, rail, nbytes, messages)
    if packed_bytes is not None:
        parts.pack(packed_bytes)
    fill_s = max((_fill_s(trees[i], nodes, min(bucket_bytes, largest)) for i in sorted(by_tree)), default=0.0)
    fill_s += parts.stage_s(bucket_bytes)
    return Times(parts.loads(), fill_s, amax_s(nodes, amax_elements))


def amax_s(nodes: Nodes, num_elements: int) -> float:
    """Seconds of an all-reduce(max) of ``num_elements`` f32 among all trainer ranks: the better of ring and halving.

    Source: the costs of both algorithms in the alpha-beta model (Thakur et al., 2005).
    """
    ranks = len(nodes.sources)
    if not num_elements or ranks < 2:
        return 0.0
    per_node: dict[int, int] = {}
    for node in nodes.source_node:
        per_node[node] = per_node.get(node, 0) + 1
    rates = [nodes.groups[n].local_gbps for n in per_node]
    if len(per_node) > 1:
        rates += [nodes.groups[n].network_gbps / count for n, count in per_node.items() if nodes.groups[n].nics]
    moved_s = 2 * (ranks - 1) / ranks * 4 * num_elements / (min(rates) * 1e9)
    return moved_s + min(2 * (ranks - 1), 2 * math.ceil(math.log2(ranks))) * nodes.cluster.alpha_s


def best_bucket_bytes(chain_bytes: int, num_hops: int, rate_gbps: float, alpha_s: float) -> int:
    """Bucket size at which a chain is fastest: ``m = sqrt((h - 1) S / (alpha B))`` buckets."""
    if num_hops < 2 or not alpha_s or not chain_bytes:
        return max(1, chain_bytes)
    count = math.sqrt((num_hops - 1) * chain_bytes / (alpha_s * rate_gbps * 1e9))
    return max(1, math.ceil(chain_bytes / max(1.0, count)))


def _fill_s(tree: Tree, nodes: Nodes, bucket_bytes: int) -> float:
    """Seconds from the arrival of the first bucket at the first rank until it is at the last one."""
    at = {SOURCE: 0.0}
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        if src == SOURCE:
            at[dst] = 0.0
            continue
        here, there = nodes.sinks[src], nodes.sinks[dst]
        if rail == LOCAL:
            rate = min(nodes.groups[here.node].local_gbps, nodes.groups[there.node].local_gbps)
        else:
            ends = (nodes.sink_nic(src, rail), nodes.sink_nic(dst, rail))
            rate = min(nodes.nics[i].rate_gbps for i in ends)
        at[dst] = at[src] + nodes.cluster.alpha_s + bucket_bytes / (rate * 1e9)
    return max(at.values())


@dataclass(slots=True)
class _Load:
    rate_gbps: float
    nbytes: int = 0
    busy_s: float = 0.0
    messages: int = 0


@dataclass
class _Parts:
    """What every part of the cluster carries."""

    nodes: Nodes
    by_name: dict[str, _Load] = field(default_factory=dict)
    paths: dict[tuple[bool, int, int, int], tuple[_Load, ...]] = field(default_factory=dict)

    def hop(self, from_source: bool, src: int, dst: int, rail: int, nbytes: int, messages: int) -> None:
        """Count a hop."""
        key = (from_source, src, dst, rail)
        path = self.paths.get(key)
        if path is None:
            path = self.paths[key] = self._path(*key)
        for load in path:
            load.nbytes += nbytes
        path[0].messages += messages

    def copy(self, lane: Lane, nbytes: int) -> None:
        """Count one pass through the memory of a node without GPUs."""
        if lane.gpu < 0:
            self._memory(lane).nbytes += nbytes

    def pack(self, packed_bytes: Sequence[int]) -> None:
        """Count what trainer ranks read and write to pack."""
        for rank, nbytes in enumerate(packed_bytes):
            rate = self.nodes.groups[self.nodes.source_node[rank]].hbm_gbps
            if rate is not None and nbytes:
                self._part(f"memory of trainer rank {rank}", rate).nbytes += nbytes

    def stage_s(self, bucket_bytes: int) -> float:
        """What one bucket costs in the stages before and after the wire, which nothing overlaps."""
        rates = [g.hbm_gbps or g.host_gbps for g in self.nodes.groups]
        return 2 * bucket_bytes / (min(rates) * 1e9) if self.by_name else 0.0

    def loads(self) -> tuple[LinkLoad, ...]:
        """Everything that carries bytes, the busiest first."""
        alpha_s = self.nodes.cluster.alpha_s
        out = [
            LinkLoad(name, load.nbytes, load.nbytes / (load.rate_gbps * 1e9) + load.messages * alpha_s)
            for name, load in self.by_name.items()
            if load.nbytes
        ]
        return tuple(sorted(out, key=lambda x: (-x.seconds, x.name)))

    def _part(self, name: str, rate_gbps: float) -> _Load:
        found = self.by_name.get(name)
        if found is None:
            found = self.by_name[name] = _Load(rate_gbps)
        return found

    def _path(self, from_source: bool, src: int, dst: int, rail: int) -> tuple[_Load, ...]:
        """What a hop goes through; first the rank that sends."""
        nodes = self.nodes
        here, there = (nodes.sources if from_source else nodes.sinks)[src], nodes.sinks[dst]
        name = f"trainer rank {src}" if from_source else f"sink {src}"
        if rail == LOCAL:
            return (self._sender(name, here, None), *self._inside(here, there, name, f"sink {dst}"))
        out = here.reach[rail % len(here.reach)]
        into = there.reach[rail % len(there.reach)]
        path = [self._sender(name, here, out)]
        path += self._to_nic(here, out, name, "out")
        path.append(self._part(nodes.nics[out].name + " out", nodes.nics[out].rate_gbps))
        for i in nodes.zones.crossed[nodes.zone[here.node]][nodes.zone[there.node]]:
            link = nodes.cluster.links[i // 2]
            side = link.side_b if i % 2 else link.side_a
            path.append(self._part(f"link {link.name} from {'+'.join(side)}", link.rate_gbps))
        path.append(self._part(nodes.nics[into].name + " in", nodes.nics[into].rate_gbps))
        return (*path, *self._to_nic(there, into, f"sink {dst}", "in"))

    def _sender(self, name: str, lane: Lane, nic: int | None) -> _Load:
        """The rank's own sequence of messages, as fast as the widest way out of it."""
        rate = self.nodes.groups[lane.node].local_gbps
        if nic is not None:
            rate = self.nodes.ports[lane.port].rate_gbps
        return self._part(f"sending of {name}" + (" to other nodes" if nic is not None else ""), rate)

    def _inside(self, here: Lane, there: Lane, src: str, dst: str) -> list[_Load]:
        """A hop without NICs."""
        groups = self.nodes.groups
        if there.gpu < 0:
            return [self._memory(there)]
        if (here.node, here.gpu) == (there.node, there.gpu):
            return []
        if here.domain >= 0 and here.domain == there.domain:
            return [self._nvlink(here, src, "out"), self._nvlink(there, dst, "in")]
        return [
            self._part(f"PCIe of {src} out", groups[here.node].pcie_gbps or groups[here.node].host_gbps),
            self._part(f"PCIe of {dst} in", groups[there.node].pcie_gbps or groups[there.node].host_gbps),
        ]

    def _nvlink(self, lane: Lane, name: str, way: str) -> _Load:
        group = self.nodes.groups[lane.node]
        return self._part(f"NVLink of {name} {way}", group.nvlink_gbps or group.local_gbps)

    def _memory(self, lane: Lane) -> _Load:
        """The memory of a node without GPUs."""
        return self._part(f"memory of node {self.nodes.names[lane.node]}", self.nodes.groups[lane.node].host_gbps)

    def _to_nic(self, lane: Lane, nic: int, name: str, way: str) -> list[_Load]:
        """Between a rank and a NIC of its node."""
        if lane.gpu < 0:
            # What leaves was counted when it was packed or received.
            return [self._memory(lane)] if way == "in" else []
        if lane.domain >= 0 and nic not in lane.own:
            return [self._nvlink(lane, name, way)]
        group = self.nodes.groups[lane.node]
        return [self._part(f"PCIe of {name} {way}", group.pcie_gbps or group.host_gbps)]
