"""Seconds that a plan takes: the busiest part of the cluster, the filling of its pipelines, and the exchange of amaxes.

Source: the alpha-beta model of a message (Hockney), and for a chain of h hops with m buckets of b bytes
``(m + h - 1) (alpha + b / rate)``, of which the part that grows with m is a load and the rest is pipeline fill.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

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
    roots: dict[int, _Root] = {}
    largest = 0
    for (rank, tree_idx), (nbytes, messages) in sent.items():
        total = by_tree.get(tree_idx)
        if total is None:
            total = by_tree[tree_idx] = [0, 0]
            roots[tree_idx] = _root(trees[tree_idx], nodes)
        total[0] += nbytes
        total[1] += messages
        largest = max(largest, nbytes)
        parts.copy(nodes.sources[rank], nbytes)
        parts.send(rank, roots[tree_idx], nbytes, messages)
    for tree_idx, (nbytes, messages) in by_tree.items():
        parts.spread(trees[tree_idx], nbytes, messages)
    parts.count_hops()
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
            rate = min(nodes.groups[here.node].local_gbps, nodes.groups[there.node].local_gbps)
        else:
            rate = min(nodes.nics[i].rate_gbps for i in (nodes.sink_nic(src, rail), nodes.sink_nic(dst, rail)))
        sent = busy.get((src, rail == LOCAL), at[src]) + bucket_bytes / (rate * 1e9)
        busy[(src, rail == LOCAL)] = sent
        at[dst] = sent + nodes.cluster.alpha_s
    return max(at.values())


_Key = TypeVar("_Key")


def _add(sums: dict[_Key, list[int]], key: _Key, nbytes: int, messages: int) -> None:
    found = sums.get(key)
    if found is None:
        sums[key] = [nbytes, messages]
    else:
        found[0] += nbytes
        found[1] += messages


@dataclass(slots=True)
class _Load:
    rate_gbps: float
    nbytes: int = 0
    busy_s: float = 0.0
    messages: int = 0


class _Root(NamedTuple):
    """The hops of a tree that start at the sender.

    Attributes:
        rails: of those to other islands, and how many of them take each.
        zones: where these lead, and how many to each; empty where there is one zone only.
        local: the sinks of the others.
    """

    rails: dict[int, int]
    zones: dict[int, int]
    local: tuple[int, ...]


def _root(tree: Tree, nodes: Nodes) -> _Root:
    starts = [(dst, rail) for (src, dst), rail in zip(tree.hops, tree.rails, strict=True) if src == SOURCE]
    away = [(dst, rail) for dst, rail in starts if rail != LOCAL]
    zones = Counter(nodes.zone[nodes.sink_node[dst]] for dst, _ in away) if nodes.zones.count > 1 else {}
    return _Root(Counter(rail for _, rail in away), zones, tuple(dst for dst, rail in starts if rail == LOCAL))


@dataclass
class _Parts:
    """What every part of the cluster carries.

    Hops are summed up by their ends first, which are few: what a rank sends on a rail (bytes and messages), what a sink
    gets on one, what goes from zone to zone. Only hops inside an island depend on both ends.
    """

    nodes: Nodes
    by_name: dict[str, _Load] = field(default_factory=dict)
    _out: dict[tuple[bool, int, int], list[int]] = field(default_factory=dict)
    _into: dict[tuple[int, int], int] = field(default_factory=dict)
    _local: dict[tuple[bool, int, int], list[int]] = field(default_factory=dict)
    _crossed: dict[tuple[int, int], int] = field(default_factory=dict)

    def send(self, rank: int, root: _Root, nbytes: int, messages: int) -> None:
        """Count what leaves a trainer rank along one tree."""
        for rail, count in root.rails.items():
            _add(self._out, (True, rank, rail), nbytes * count, messages * count)
        for dst in root.local:
            _add(self._local, (True, rank, dst), nbytes, messages)
        here = self.nodes.zone[self.nodes.source_node[rank]]
        for zone, count in root.zones.items():
            self._cross(here, zone, nbytes * count)

    def spread(self, tree: Tree, nbytes: int, messages: int) -> None:
        """Count what arrives along one tree, from whomever, and what sinks pass on."""
        zone, node, linked = self.nodes.zone, self.nodes.sink_node, self.nodes.zones.count > 1
        for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
            if rail != LOCAL:
                self._into[(dst, rail)] = self._into.get((dst, rail), 0) + nbytes
            if src == SOURCE:
                continue
            if rail == LOCAL:
                _add(self._local, (False, src, dst), nbytes, messages)
            else:
                _add(self._out, (False, src, rail), nbytes, messages)
                if linked:
                    self._cross(zone[node[src]], zone[node[dst]], nbytes)

    def _cross(self, here: int, there: int, nbytes: int) -> None:
        self._crossed[(here, there)] = self._crossed.get((here, there), 0) + nbytes

    def count_hops(self) -> None:
        """Spread what hops carry over the parts that they go through."""
        for (from_source, src, rail), (nbytes, messages) in self._out.items():
            path = self._way_out(from_source, src, rail)
            path[0].messages += messages
            for load in path:
                load.nbytes += nbytes
        for (dst, rail), nbytes in self._into.items():
            for load in self._way_in(dst, rail):
                load.nbytes += nbytes
        for (here, there), nbytes in self._crossed.items():
            for i in self.nodes.zones.crossed[here][there]:
                link = self.nodes.cluster.links[i // 2]
                side = link.side_b if i % 2 else link.side_a
                self._part(f"link {link.name} from {'+'.join(side)}", link.rate_gbps).nbytes += nbytes
        for (from_source, src, dst), (nbytes, messages) in self._local.items():
            path = self._inside(from_source, src, dst)
            path[0].messages += messages
            for load in path:
                load.nbytes += nbytes

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

    def _way_out(self, from_source: bool, src: int, rail: int) -> list[_Load]:
        """What bytes go through to leave an island; first the rank that sends."""
        here, name = self._end(from_source, src)
        nic = here.reach[rail % len(here.reach)]
        path = [self._sender(name, here, nic), *self._to_nic(here, nic, name, "out")]
        return [*path, self._part(self.nodes.nics[nic].name + " out", self.nodes.nics[nic].rate_gbps)]

    def _way_in(self, dst: int, rail: int) -> list[_Load]:
        there, name = self._end(False, dst)
        nic = there.reach[rail % len(there.reach)]
        into = self._part(self.nodes.nics[nic].name + " in", self.nodes.nics[nic].rate_gbps)
        return [into, *self._to_nic(there, nic, name, "in")]

    def _end(self, from_source: bool, idx: int) -> tuple[Lane, str]:
        """Where one end of a hop is, and its name."""
        if from_source:
            return self.nodes.sources[idx], f"trainer rank {idx}"
        return self.nodes.sinks[idx], f"sink {idx}"

    def _sender(self, name: str, lane: Lane, nic: int | None) -> _Load:
        """The rank's own sequence of messages, as fast as the widest way out of it."""
        rate = self.nodes.groups[lane.node].local_gbps
        if nic is not None:
            rate = self.nodes.ports[lane.port].rate_gbps
        return self._part(f"sending of {name}" + (" to other nodes" if nic is not None else ""), rate)

    def _inside(self, from_source: bool, src_idx: int, dst_idx: int) -> list[_Load]:
        """A hop without NICs; first the rank that sends."""
        groups = self.nodes.groups
        (here, src), (there, dst) = self._end(from_source, src_idx), self._end(False, dst_idx)
        sender = self._sender(src, here, None)
        if there.gpu < 0:
            return [sender, self._memory(there)]
        if (here.node, here.gpu) == (there.node, there.gpu):
            return [sender]
        if here.domain >= 0 and here.domain == there.domain:
            return [sender, self._nvlink(here, src, "out"), self._nvlink(there, dst, "in")]
        return [
            sender,
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
