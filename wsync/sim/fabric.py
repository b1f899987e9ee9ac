"""The resources of a cluster, and which of them a byte occupies between two ranks.

Ports are full duplex: each direction is a resource of its own. Which ports a rank reaches is for `wsync.plan.nodes` to
say: its GPU's own ones directly, those of the other GPUs of its NVLink domain over NVLink.
"""

from __future__ import annotations

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

    group: NodeGroup
    host: int
    hbm: tuple[int, ...]
    nvlink: tuple[Ports, ...]
    pcie: tuple[Ports, ...]


class Fabric:
    """All resources of the nodes of a job.

    Args:
        nodes: of the job.
        rate_of: host -> factor on all its rates (stragglers).
        costs: of ranks without a GPU, if they were measured.

    Attributes:
        nodes: as given.
        resources: all of them.
        parts: of each node.
        nics: out and in of each port of `Nodes.nics`.
        costs: as given.
    """

    def __init__(
        self, nodes: Nodes, rate_of: Mapping[str, float] | None = None, costs: HostCosts | None = None
    ) -> None:
        self.nodes = nodes
        self.costs = costs
        self.resources: list[Resource] = []
        factors = [(rate_of or {}).get(name, 1.0) for name in nodes.names]
        self.parts = [self._add_node(*entry) for entry in zip(nodes.names, nodes.groups, factors, strict=True)]
        alpha_s = nodes.cluster.alpha_s
        self.nics = [
            self._add_pair(f"{nodes.names[n.node]}/nic{n.slot}", "nic", n.rate_gbps * factors[n.node], alpha_s)
            for n in nodes.nics
        ]
        links = nodes.cluster.links
        self._links = [r for k in links for r in self._add_pair(f"link {k.name}", "link", k.rate_gbps, 0.0)]
        self._cores = {} if costs is None else self._add_cores(costs.rank_gbps, factors)
        self._lost: set[int] = set()
        self._turn = 0

    def _add(self, name: str, kind: str, rate_gbps: float, alpha_s: float) -> int:
        self.resources.append(Resource(name, kind, rate_gbps * 1e9, alpha_s))
        return len(self.resources) - 1

    def _add_pair(self, name: str, kind: str, rate_gbps: float, alpha_s: float) -> Ports:
        out = self._add(f"{name} out", kind, rate_gbps, alpha_s)
        return Ports(out, self._add(f"{name} in", kind, rate_gbps, alpha_s))

    def _add_node(self, host: str, group: NodeGroup, factor: float) -> NodeParts:
        alpha_s = self.nodes.cluster.alpha_s
        gpus = range(group.num_gpus)
        hbm = [self._add(f"{host}/hbm{g}", "hbm", (group.hbm_gbps or group.host_gbps) * factor, 0.0) for g in gpus]
        nvlink: list[Ports] = []
        if group.nvlink_domain > 1 and group.nvlink_gbps is not None:
            rate = group.nvlink_gbps * factor
            nvlink = [self._add_pair(f"{host}/nvlink{g}", "nvlink", rate, alpha_s) for g in gpus]
        rate = (group.pcie_gbps or group.host_gbps) * factor
        pcie = [self._add_pair(f"{host}/pcie{g}", "pcie", rate, alpha_s) for g in gpus]
        # A hop inside a node of CPUs is a pass through its memory and costs alpha; on other nodes nothing hops there.
        memory = self._add(f"{host}/memory", "host", group.host_gbps * factor, 0.0 if gpus else alpha_s)
        return NodeParts(group, memory, tuple(hbm), tuple(nvlink), tuple(pcie))

    def _add_cores(self, rate_gbps: float, factors: Sequence[float]) -> dict[int, int]:
        """By `id` of its lane: what each rank without a GPU computes on."""
        sides = (("trainer", self.nodes.sources), ("sink", self.nodes.sinks))
        return {
            id(lane): self._add(f"{self.nodes.names[lane.node]}/{side}{i}", "core", rate_gbps * factors[lane.node], 0.0)
            for side, lanes in sides
            for i, lane in enumerate(lanes)
            if lane.gpu < 0
        }

    def memory(self, lane: Lane) -> Path:
        """What a rank occupies with a pass through memory."""
        parts = self.parts[lane.node]
        if lane.gpu >= 0:
            return (parts.hbm[lane.gpu],)
        core = self._cores.get(id(lane))
        return (parts.host,) if core is None else (core, parts.host)

    def hop_passes(self, a: Lane, b: Lane) -> float:
        """Bytes that a hop moves through its path for each byte on the wire."""
        return self.costs.hop if self.costs is not None and b.gpu < 0 and self.is_local(a, b) else 1.0

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
        if a.gpu < 0 or b.gpu < 0:
            return self.memory(b)
        if (a.node, a.gpu) == (b.node, b.gpu):
            return (here.hbm[a.gpu],)
        if a.domain >= 0 and a.domain == b.domain:
            return (here.nvlink[a.gpu].out, there.nvlink[b.gpu].into)
        return (here.pcie[a.gpu].out, there.pcie[b.gpu].into)

    def _remote(self, a: Lane, b: Lane, rail: int) -> Path | None:
        out, into = self._port(a, rail, 0), self._port(b, rail, 1)
        if out is None or into is None:
            return None
        crossed = self.nodes.zones.crossed[self.nodes.zone[a.node]][self.nodes.zone[b.node]]
        return (
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
        if lane.gpu < 0:
            return (parts.host,)
        return () if nic in lane.own or not parts.nvlink else (parts.nvlink[lane.gpu][direction],)

    def node_index(self, host: str) -> int:
        """Index of a node by its name.

        Raises:
            ConfigError: no rank runs on such a node.
        """
        names = self.nodes.names
        if host not in names:
            raise ConfigError(
                f"node {host!r} has no rank of this plan, whose nodes are {_some(names)}", hint=nearest(host, names)
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
        parts = self.parts[node]
        nics = [ports for ports, nic in zip(self.nics, self.nodes.nics, strict=True) if nic.node == node]
        lost = {parts.host, *parts.hbm, *(r for ports in [*parts.nvlink, *parts.pcie, *nics] for r in ports)}
        self._lost |= lost
        return lost

    def is_cut_off(self, lane: Lane) -> bool:
        """Whether a rank had ports, and none of them works."""
        return bool(lane.reach) and all(self.nics[i].out in self._lost for i in lane.reach)


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
