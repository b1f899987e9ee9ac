"""What every part of the cluster carries: memories, PCIe, NVLink, NICs, shared links, and ranks that send.

What crosses the memory of a node with GPUs is read there or written there, and `NodeGroup.host_gbps` is the rate of a
copy, which does both: one pass goes at twice that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from wsync.plan.flows import LOCAL
from wsync.plan.nodes import Nodes
from wsync.plan.places import Lane


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


@dataclass(slots=True)
class _Load:
    rate_gbps: float
    nbytes: int = 0
    busy_s: float = 0.0
    messages: int = 0


@dataclass
class Parts:
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
        self._count(path, nbytes)
        path[0].messages += messages

    def arrive(self, sink: int, rail: int, nbytes: int) -> None:
        """Count the end of a hop from another island."""
        path = self.ends.get((sink, rail))
        if path is None:
            path = self.ends[(sink, rail)] = self._end(sink, rail)
        self._count(path, nbytes)

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

    def gather(self, host_bytes: Sequence[int]) -> None:
        """Count what trainer ranks bring from host memory to their GPUs before they pack it."""
        for lane, nbytes in zip(self.nodes.sources, host_bytes, strict=True):
            if lane.offloaded:
                self._count((self._host(lane), self._pcie(lane, "in")), nbytes)

    def install(self, sink: int, nbytes: int) -> None:
        """Count what an engine rank brings from host memory to its GPU when it installs it."""
        lane = self.nodes.sinks[sink]
        if lane.in_host:
            self._count((self._host(lane), self._pcie(lane, "in")), nbytes)

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

    @staticmethod
    def _count(path: Sequence[_Load], nbytes: int) -> None:
        for load in path:
            load.nbytes += nbytes

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
        elif lane.in_host:
            rate = 2 * group.host_gbps
        elif there.in_host:
            pass
        elif (lane.node, lane.gpu) == (there.node, there.gpu) and group.hbm_gbps and lane.gpu >= 0:
            return self._part(f"memory of {name}'s GPU", group.hbm_gbps)
        return self._part(f"sending of {name}" + (" to other nodes" if nic is not None else ""), rate)

    def _inside(self, here: Lane, there: Lane) -> list[_Load]:
        """A hop without NICs."""
        if there.gpu < 0:
            return [self._memory(there)]
        if here.in_host or there.in_host:
            return self._through_host(here, there)
        if (here.node, here.gpu) == (there.node, there.gpu):
            return []
        if here.domain >= 0 and here.domain == there.domain:
            return [self._nvlink(here, "out"), self._nvlink(there, "in")]
        return [self._pcie(here, "out"), self._pcie(there, "in")]

    def _through_host(self, here: Lane, there: Lane) -> list[_Load]:
        """A hop without NICs that begins or ends in host memory: on another node of an NVLink domain over the GPUs."""
        path = [self._host(here)] if here.in_host else []
        if here.node != there.node:
            path += [self._pcie(here, "in")] if here.in_host else []
            path += [self._nvlink(here, "out"), self._nvlink(there, "in")]
            path += [self._pcie(there, "out")] if there.in_host else []
        elif not here.in_host:
            path.append(self._pcie(here, "out"))
        elif not there.in_host:
            path.append(self._pcie(there, "in"))
        return [*path, self._host(there)] if there.in_host else path

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

    def _host(self, lane: Lane) -> _Load:
        """The memory of a node with GPUs, by the pass."""
        name = f"host memory of node {self.nodes.names[lane.node]}"
        return self._part(name, 2 * self.nodes.groups[lane.node].host_gbps)

    def _to_nic(self, lane: Lane, nic: int, way: str) -> list[_Load]:
        """Between a rank and a NIC of its node."""
        if lane.gpu < 0:
            # What leaves was counted when it was packed or received.
            return [self._memory(lane)] if way == "in" else []
        if lane.in_host:
            return [self._host(lane)]
        if lane.domain >= 0 and nic not in lane.own:
            return [self._nvlink(lane, way)]
        return [self._pcie(lane, way)]
