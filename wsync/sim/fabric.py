"""The resources of a cluster, and which of them a bucket occupies between two ranks.

The parts and their rates are those that `wsync.plan.timing` counts. Ports and NVLink are full duplex: each direction is
a resource of its own. A rank sends its messages one after the other, each for alpha and its bytes at the rate of all
ports that the rank reaches; ports that are not its GPU's own are reached over NVLink.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.plan.nodes import Nodes
from wsync.plan.places import Lane
from wsync.sim.engine import Path, Resource
from wsync.sim.options import HostCosts, nearest
from wsync.spec.cluster import NodeGroup


class Ports(NamedTuple):
    """Out and in of one part, as resource indices."""

    out: int
    into: int


@dataclass(frozen=True)
class NodeParts:
    """Resources of one node: the host's memory, and what each GPU has."""

    host: int
    hbm: tuple[int, ...]
    nvlink: tuple[Ports, ...]
    pcie: tuple[Ports, ...]


@dataclass(frozen=True)
class RankParts:
    """Resources of one rank: what it sends to other nodes on, and inside its own if that has no GPUs; what it computes
    on, if that was measured. -1 for what it does not have."""

    remote: int
    local: int
    core: int


class Fabric:
    """All resources of the nodes of a job.

    Args:
        nodes: of the job.
        rate_of: host -> factor on all its rates (stragglers).
        costs: of ranks without a GPU, if they were measured.

    Attributes:
        nodes, costs: as given.
        resources: all of them.
        parts: of each node.
        nics: out and in of each port of `Nodes.nics`.
    """

    def __init__(
        self, nodes: Nodes, rate_of: Mapping[str, float] | None = None, costs: HostCosts | None = None
    ) -> None:
        self.nodes = nodes
        self.costs = costs
        self.resources: list[Resource] = []
        self._factors = [(rate_of or {}).get(name, 1.0) for name in nodes.names]
        self.parts = [self._add_node(i, group) for i, group in enumerate(nodes.groups)]
        self.nics = [self._add_pair(n.node, f"nic{n.slot}", "nic", n.rate_gbps) for n in nodes.nics]
        self._links = [
            self._add(f"link {k.name} from {'+'.join(side)}", "link", k.rate_gbps)
            for k in nodes.cluster.links
            for side in (k.side_a, k.side_b)
        ]
        sides = (("trainer", nodes.sources), ("sink", nodes.sinks))
        self._ranks = {id(x): self._add_rank(f"{side}{i}", x) for side, lanes in sides for i, x in enumerate(lanes)}
        self._lost: set[int] = set()
        self._turn = 0
        self._pcie: dict[tuple[int, int, int], bool] = {}
        self._staging = {(x.node, x.gpu) for _, lanes in sides for x in lanes if x.offloaded or x.in_host}

    def _add(self, name: str, kind: str, rate_gbps: float, node: int | None = None) -> int:
        factor = 1.0
        if node is not None:
            name, factor = f"{self.nodes.names[node]}/{name}", self._factors[node]
        self.resources.append(Resource(name, kind, rate_gbps * 1e9 * factor, -1 if node is None else node))
        return len(self.resources) - 1

    def _add_pair(self, node: int, name: str, kind: str, rate_gbps: float) -> Ports:
        out = self._add(f"{name} out", kind, rate_gbps, node)
        return Ports(out, self._add(f"{name} in", kind, rate_gbps, node))

    def _add_node(self, node: int, group: NodeGroup) -> NodeParts:
        gpus = range(group.num_gpus)
        host, hbm, pcie = group.host_gbps, group.hbm_gbps, group.pcie_gbps
        has_nvlink = group.nvlink_domain > 1 and group.nvlink_gbps is not None
        # A copy reads and writes; what passes between the memory of a node and its GPUs or ports does one of the two.
        memory = ("host memory", 2 * host) if gpus else ("memory", host)
        return NodeParts(
            self._add(memory[0], "host", memory[1], node),
            tuple(self._add(f"hbm{g}", "hbm", hbm or host, node) for g in gpus),
            tuple(self._add_pair(node, f"nvlink{g}", "nvlink", group.nvlink_gbps or host) for g in gpus if has_nvlink),
            tuple(self._add_pair(node, f"pcie{g}", "pcie", pcie or host) for g in gpus),
        )

    def _add_rank(self, name: str, lane: Lane) -> RankParts:
        remote = local = core = -1
        if lane.reach:
            remote = self._add(f"{name} sends", "send", self.nodes.ports[lane.port].rate_gbps, lane.node)
        if lane.gpu < 0:
            local = self._add(f"{name} sends inside", "send", self.nodes.groups[lane.node].host_gbps, lane.node)
        if lane.gpu < 0 and self.costs is not None:
            core = self._add(f"{name} core", "core", self.costs.rank_gbps, lane.node)
        return RankParts(remote, local, core)

    def memory(self, lane: Lane) -> Path:
        """What a rank occupies with a pass through memory."""
        parts = self.parts[lane.node]
        if lane.gpu >= 0:
            return (parts.hbm[lane.gpu],)
        core = self._ranks[id(lane)].core
        return (parts.host,) if core < 0 else (core, parts.host)

    def from_host(self, lane: Lane) -> Path:
        """What a rank occupies that brings bytes from the memory of its node to its GPU.

        PCIe first, so that the GPUs of a node take turns in its memory: all buckets of a rank queue at once.
        """
        parts = self.parts[lane.node]
        return (parts.pcie[lane.gpu].into, parts.host)

    def hop_passes(self, a: Lane, b: Lane) -> float:
        """Bytes that a hop moves through its path for each byte on the wire."""
        if not self.is_local(a, b):
            return 1.0
        if b.gpu < 0:
            return self.costs.hop if self.costs is not None else 1.0
        if a.in_host or b.in_host:
            return 2.0 if a.in_host and b.in_host and a.node == b.node else 1.0
        return 2.0 if (a.node, a.gpu) == (b.node, b.gpu) else 1.0

    def is_local(self, a: Lane, b: Lane) -> bool:
        """Whether two ranks exchange bytes without a port."""
        return self.nodes.island[a.node] == self.nodes.island[b.node]

    def path(self, a: Lane, b: Lane, rail: int) -> Path | None:
        """What a bucket occupies from ``a`` to ``b``; None if one of the two has no port (left).

        Args:
            a, b: the two ranks.
            rail: index of the port among those that each of them reaches; negative inside an island.
        """
        return self._local(a, b) if self.is_local(a, b) else self._remote(a, b, max(rail, 0))

    def _local(self, a: Lane, b: Lane) -> Path:
        here, there = self.parts[a.node], self.parts[b.node]
        if b.gpu < 0:
            return self.memory(b) if self.costs is not None else (self._ranks[id(a)].local, there.host)
        if a.in_host or b.in_host:
            return self._through_host(a, b)
        if (a.node, a.gpu) == (b.node, b.gpu):
            return (here.hbm[a.gpu],)
        if a.domain >= 0 and a.domain == b.domain:
            return (here.nvlink[a.gpu].out, there.nvlink[b.gpu].into)
        return (here.pcie[a.gpu].out, there.pcie[b.gpu].into)

    def _through_host(self, a: Lane, b: Lane) -> Path:
        """As `wsync.plan.loads` counts it; a copy inside one memory passes it twice."""
        here, there = self.parts[a.node], self.parts[b.node]
        if a.node != b.node:
            up = self.from_host(a) if a.in_host else ()
            down = (there.pcie[b.gpu].out, there.host) if b.in_host else ()
            return (*up, here.nvlink[a.gpu].out, there.nvlink[b.gpu].into, *down)
        if a.in_host:
            return (here.host,) if b.in_host else self.from_host(b)
        return (here.pcie[a.gpu].out, there.host)

    def _remote(self, a: Lane, b: Lane, rail: int) -> Path | None:
        out, into = self._port(a, rail, 0), self._port(b, rail, 1)
        if out is None or into is None:
            return None
        crossed = self.nodes.zones.crossed[self.nodes.zone[a.node]][self.nodes.zone[b.node]]
        return (
            self._ranks[id(a)].remote,
            *self._to_port(a, out, 0),
            self.nics[out].out,
            *(self._links[link] for link in crossed),
            self.nics[into].into,
            *self._to_port(b, into, 1),
        )

    def _port(self, lane: Lane, rail: int, direction: int) -> int | None:
        """The port of that rail, or in turn one of those that are left."""
        if not lane.reach:
            return None
        wanted = lane.reach[rail % len(lane.reach)]
        if self.nics[wanted][direction] not in self._lost:
            return wanted
        left = [i for i in lane.reach if self.nics[i][direction] not in self._lost]
        if not left:
            return None
        self._turn += 1
        return left[self._turn % len(left)]

    def _to_port(self, lane: Lane, nic: int, direction: int) -> Path:
        """What lies between a rank and a port that it reaches."""
        parts = self.parts[lane.node]
        if lane.gpu < 0:  # what leaves was in memory when it was packed or received
            return (parts.host,) if direction else ()
        if lane.in_host:
            return (parts.host,)
        if lane.domain >= 0 and nic not in lane.own:
            return (parts.nvlink[lane.gpu][direction],)
        return (parts.pcie[lane.gpu][direction],) if self._pcie_counts(lane) else ()

    def _pcie_counts(self, lane: Lane) -> bool:
        """Whether PCIe can be what a rank's own ports wait for.

        Where nothing but these ports uses it and it is at least as fast as all of them together, a bucket is through it
        before it is through its port, whatever else is under way: leaving it out changes no time.
        """
        key = (lane.node, lane.gpu, lane.domain)
        if key not in self._pcie:
            own_gbps = math.fsum(self.nodes.nics[i].rate_gbps for i in lane.own)
            pcie_gbps = self.nodes.groups[lane.node].pcie_gbps
            is_shared = lane.domain < 0 or (lane.node, lane.gpu) in self._staging
            self._pcie[key] = is_shared or pcie_gbps is None or own_gbps > pcie_gbps
        return self._pcie[key]

    def node_index(self, host: str) -> int:
        """Index of a node by its name.

        Raises:
            ConfigError: no rank runs on such a node.
        """
        names = self.nodes.names
        if host not in names:
            raise ConfigError(
                f"node {host!r} has no rank of this plan, whose nodes are {some(names)}", hint=nearest(host, names)
            )
        return names.index(host)

    def port_index(self, node: int, number: int) -> int:
        """Index into ``nics`` of a node's port.

        Raises:
            ConfigError: the node has fewer ports.
        """
        count = len(self.nodes.groups[node].nics)
        if not 0 <= number < count:
            raise ConfigError(f"node {self.nodes.names[node]!r} has {count} ports, from 0 on; got {number}")
        return next(i for i, n in enumerate(self.nodes.nics) if (n.node, n.slot) == (node, number))

    def lose_port(self, nic: int) -> set[int]:
        """Forget a port; returns its resources."""
        lost = set(self.nics[nic])
        self._lost |= lost
        return lost

    def lose_node(self, node: int) -> set[int]:
        """Forget a node; returns all its resources."""
        lost = {i for i, r in enumerate(self.resources) if r.node == node}
        self._lost |= lost
        return lost

    def is_cut_off(self, lane: Lane) -> bool:
        """Whether a rank had ports, and none of them works."""
        return bool(lane.reach) and all(self.nics[i].out in self._lost for i in lane.reach)


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first of some names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
