"""Seconds that a plan takes: the busiest part of the cluster, the filling of its pipelines, and the exchange of amaxes.

Source: the alpha-beta model of a message (Hockney), and for a chain of h hops with m buckets of b bytes
``(m + h - 1) (alpha + b / rate)``, of which the part that grows with m is a load and the rest is pipeline fill.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from wsync.errors import ConfigError
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
        flow_buckets: messages of each flow; None for as few as hold its bytes, where flows have no pieces yet.

    Raises:
        ConfigError: trainer ranks that exchange amaxes cannot reach each other.
    """
    parts = _Parts(nodes)
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
    if packed_bytes is not None:
        parts.pack(packed_bytes)
    fill_s = max((_fill_s(trees[i], nodes, min(bucket_bytes, largest)) for i in sorted(by_tree)), default=0.0)
    fill_s += parts.stage_s(bucket_bytes)
    return Times(parts.loads(), fill_s, amax_s(nodes, amax_elements))


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
    ends: dict[tuple[int, int], tuple[_Load, ...]] = field(default_factory=dict)

    def hop(self, key: tuple[bool, int, int, int], nbytes: int, messages: int) -> None:
        """Count what leaves by (whether a trainer rank sends, who, rail, zone); inside an island all of (.., sink)."""
        path = self.paths.get(key)
        if path is None:
            path = self.paths[key] = self._path(*key)
        for load in path:
            load.nbytes += nbytes
        path[0].messages += messages

    def arrive(self, sink: int, rail: int, nbytes: int) -> None:
        """Count the end of a hop from another island."""
        path = self.ends.get((sink, rail))
        if path is None:
            path = self.ends[(sink, rail)] = self._end(sink, rail)
        for load in path:
            load.nbytes += nbytes

    def copy(self, lane: Lane, nbytes: int) -> None:
        """Count one pass through the memory of a node without GPUs."""
        if lane.gpu < 0:
            self._memory(lane).nbytes += nbytes

    def pack(self, packed_bytes: Sequence[int]) -> None:
        """Count what trainer ranks read and write to pack."""
        for rank, nbytes in enumerate(packed_bytes):
            lane = self.nodes.sources[rank]
            rate = self.nodes.groups[lane.node].hbm_gbps
            if lane.gpu >= 0 and rate is not None and nbytes:
                self._part(f"memory of {self._gpu(lane)}", rate).nbytes += nbytes

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

    def _path(self, from_source: bool, src: int, rail: int, where: int) -> tuple[_Load, ...]:
        """What a hop goes through until it is in its zone; first the rank that sends."""
        nodes = self.nodes
        here = (nodes.sources if from_source else nodes.sinks)[src]
        name = f"trainer rank {src}" if from_source else f"sink {src}"
        if rail == LOCAL:
            there = nodes.sinks[where]
            return (self._sender(name, here, there, None), *self._inside(here, there))
        out = here.reach[rail % len(here.reach)]
        path = [self._sender(name, here, here, out)]
        path += self._to_nic(here, out, "out")
        path.append(self._part(nodes.nics[out].name + " out", nodes.nics[out].rate_gbps))
        for i in nodes.zones.crossed[nodes.zone[here.node]][where]:
            link = nodes.cluster.links[i // 2]
            side = link.side_b if i % 2 else link.side_a
            path.append(self._part(f"link {link.name} from {'+'.join(side)}", link.rate_gbps))
        return tuple(path)

    def _end(self, sink: int, rail: int) -> tuple[_Load, ...]:
        """What a hop from another island goes through when it arrives."""
        lane, nodes = self.nodes.sinks[sink], self.nodes
        into = lane.reach[rail % len(lane.reach)]
        nic = self._part(nodes.nics[into].name + " in", nodes.nics[into].rate_gbps)
        return (nic, *self._to_nic(lane, into, "in"))

    def _sender(self, name: str, lane: Lane, there: Lane, nic: int | None) -> _Load:
        """The rank's own sequence of messages, as fast as the widest way out of it."""
        group = self.nodes.groups[lane.node]
        rate = max(group.local_gbps, (group.pcie_gbps or 0.0) if lane.gpu >= 0 else 0.0)
        if nic is not None:
            rate = self.nodes.ports[lane.port].rate_gbps
        elif (lane.node, lane.gpu) == (there.node, there.gpu) and group.hbm_gbps and lane.gpu >= 0:
            return self._part(f"memory of {name}'s GPU", group.hbm_gbps)
        return self._part(f"sending of {name}" + (" to other nodes" if nic is not None else ""), rate)

    def _inside(self, here: Lane, there: Lane) -> list[_Load]:
        """A hop without NICs."""
        if there.gpu < 0:
            return [self._memory(there)]
        if (here.node, here.gpu) == (there.node, there.gpu):
            return []
        if here.domain >= 0 and here.domain == there.domain:
            return [self._nvlink(here, "out"), self._nvlink(there, "in")]
        return [self._pcie(here, "out"), self._pcie(there, "in")]

    def _gpu(self, lane: Lane) -> str:
        """A GPU's name: a trainer rank and an engine rank that share it share its ways in and out."""
        return f"GPU {lane.gpu} of node {self.nodes.names[lane.node]}"

    def _nvlink(self, lane: Lane, way: str) -> _Load:
        group = self.nodes.groups[lane.node]
        return self._part(f"NVLink of {self._gpu(lane)} {way}", group.nvlink_gbps or group.local_gbps)

    def _pcie(self, lane: Lane, way: str) -> _Load:
        group = self.nodes.groups[lane.node]
        return self._part(f"PCIe of {self._gpu(lane)} {way}", group.pcie_gbps or group.host_gbps)

    def _memory(self, lane: Lane) -> _Load:
        """The memory of a node without GPUs."""
        return self._part(f"memory of node {self.nodes.names[lane.node]}", self.nodes.groups[lane.node].host_gbps)

    def _to_nic(self, lane: Lane, nic: int, way: str) -> list[_Load]:
        """Between a rank and a NIC of its node."""
        if lane.gpu < 0:
            # What leaves was counted when it was packed or received.
            return [self._memory(lane)] if way == "in" else []
        if lane.domain >= 0 and nic not in lane.own:
            return [self._nvlink(lane, way)]
        return [self._pcie(lane, way)]
