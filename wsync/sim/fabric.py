"""The resources of a cluster, and which of them a byte occupies between two places.

Ports are full duplex: each direction is a resource of its own. Any GPU of an NVLink domain reaches every port of its
node, its own directly and the others over NVLink; without NVLink it crosses PCIe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.sim.engine import Path, Resource
from wsync.spec.cluster import Cluster, NodeGroup

CLOSE = ("PIX", "PXB")
"""Paths of `NicPath` that make a port a GPU's own."""


class Place(NamedTuple):
    """Where a rank is: index of its node, and of its GPU there (-1 in host memory)."""

    node: int
    gpu: int


class Ports(NamedTuple):
    """Out and in of one part, as resource indices."""

    out: int
    into: int


@dataclass(frozen=True)
class NodeParts:
    """Resources of one node: the host's memory, and for each GPU and port its own."""

    group: NodeGroup
    host: int
    hbm: tuple[int, ...]
    nvlink: tuple[Ports, ...]
    pcie: tuple[Ports, ...]
    nics: tuple[Ports, ...]
    own_nics: tuple[tuple[int, ...], ...]


def own_nics(group: NodeGroup) -> tuple[tuple[int, ...], ...]:
    """For each GPU of a node the indices of its own ports: those that are close, else its even share."""
    count = max(len(group.nics), 1)
    out = []
    for gpu in range(group.num_gpus):
        named = tuple(i for i, n in enumerate(group.nics) if any(p.gpu == gpu and p.path in CLOSE for p in n.gpus))
        share = tuple(i for i in range(len(group.nics)) if i * group.num_gpus // count == gpu)
        out.append(named or share or (gpu * count // group.num_gpus,) * bool(group.nics))
    return tuple(out)


class Fabric:
    """All resources of the nodes of a job.

    Args:
        hosts: names of the nodes; `Place.node` counts them.
        cluster: they belong to.
        rate_of: host -> factor on all its rates (stragglers).

    Attributes:
        resources: all of them.
        nodes: the parts of each node.
        names: of the nodes.
    """

    def __init__(self, hosts: Sequence[str], cluster: Cluster, rate_of: Mapping[str, float] | None = None) -> None:
        self.resources: list[Resource] = []
        self.names = tuple(hosts)
        self._cluster = cluster
        self._lost: set[int] = set()
        self._turn = 0
        group_of = cluster.group_by_host(self.names)
        self.nodes = [self._add_node(h, group_of[h], (rate_of or {}).get(h, 1.0)) for h in self.names]
        self._domain = self._find_domains()
        self._links = [
            (set(k.side_a), set(k.side_b), self._add_pair(f"link {k.name}", "link", k.rate_gbps, 0.0))
            for k in cluster.links
        ]

    def _add(self, name: str, kind: str, rate_gbps: float, alpha_s: float) -> int:
        self.resources.append(Resource(name, kind, rate_gbps * 1e9, alpha_s))
        return len(self.resources) - 1

    def _add_pair(self, name: str, kind: str, rate_gbps: float, alpha_s: float) -> Ports:
        return Ports(
            self._add(f"{name} out", kind, rate_gbps, alpha_s), self._add(f"{name} in", kind, rate_gbps, alpha_s)
        )

    def _add_node(self, host: str, group: NodeGroup, factor: float) -> NodeParts:
        alpha_s = self._cluster.alpha_s
        gpus = range(group.num_gpus)
        hbm = [self._add(f"{host}/hbm{g}", "hbm", (group.hbm_gbps or group.host_gbps) * factor, 0.0) for g in gpus]
        nvlink = []
        if group.nvlink_domain > 1 and group.nvlink_gbps:
            rate = group.nvlink_gbps * factor
            nvlink = [self._add_pair(f"{host}/nvlink{g}", "nvlink", rate, alpha_s) for g in gpus]
        rate = (group.pcie_gbps or group.host_gbps) * factor
        return NodeParts(
            group,
            # Every hop inside a node of CPUs is one pass of its memory.
            self._add(f"{host}/memory", "host", group.host_gbps * factor, 0.0 if group.num_gpus else alpha_s),
            tuple(hbm),
            tuple(nvlink),
            tuple(self._add_pair(f"{host}/pcie{g}", "pcie", rate, alpha_s) for g in gpus),
            tuple(
                self._add_pair(f"{host}/nic{i}", "nic", n.rate_gbps * factor, alpha_s) for i, n in enumerate(group.nics)
            ),
            own_nics(group),
        )

    def _find_domains(self) -> list[int]:
        """For each node a number that nodes of one NVLink domain share; -1 where the domain is not the whole node."""
        place = {name: (g.name, i) for g in self._cluster.groups for i, name in enumerate(g.node_names)}
        numbers: dict[tuple[str, int], int] = {}
        out = []
        for host, parts in zip(self.names, self.nodes, strict=True):
            group = parts.group
            name, i = place[host]
            if not parts.nvlink or group.nvlink_domain < group.num_gpus:
                out.append(-1)
                continue
            span = group.nvlink_domain // group.num_gpus
            out.append(numbers.setdefault((name, i // span), len(numbers)))
        return out

    def path(self, a: Place, b: Place, rail: int) -> Path | None:
        """What a bucket occupies from ``a`` to ``b``; None if no port of one of the nodes is left.

        Args:
            a, b: the two places.
            rail: index of the port on both sides; negative inside a node or NVLink domain.
        """
        if a.node == b.node or (self._domain[a.node] >= 0 and self._domain[a.node] == self._domain[b.node]):
            return self._local(a, b)
        return self._remote(a, b, max(rail, 0))

    def _local(self, a: Place, b: Place) -> Path:
        here, there = self.nodes[a.node], self.nodes[b.node]
        if a.gpu < 0 or b.gpu < 0:
            return (here.host,)
        if a == b:
            return (here.hbm[a.gpu],)
        size = here.group.nvlink_domain
        if here.nvlink and (a.node != b.node or size >= here.group.num_gpus or a.gpu // size == b.gpu // size):
            return (here.nvlink[a.gpu].out, there.nvlink[b.gpu].into)
        return (here.pcie[a.gpu].out, there.pcie[b.gpu].into)

    def _remote(self, a: Place, b: Place, rail: int) -> Path | None:
        out, into = self._port(a, rail, 0), self._port(b, rail, 1)
        if out is None or into is None:
            return None
        here, there = self.nodes[a.node], self.nodes[b.node]
        return (
            *self._to_port(here, a.gpu, out, 0),
            here.nics[out].out,
            *self._crossed(here.group.name, there.group.name),
            there.nics[into].into,
            *self._to_port(there, b.gpu, into, 1),
        )

    def _port(self, place: Place, rail: int, direction: int) -> int | None:
        """The port of that rail, or in turn one of those that are left."""
        nics = self.nodes[place.node].nics
        if not nics:
            return None
        wanted = rail % len(nics)
        if nics[wanted][direction] not in self._lost:
            return wanted
        left = [i for i, n in enumerate(nics) if n[direction] not in self._lost]
        if not left:
            return None
        self._turn += 1
        return left[self._turn % len(left)]

    def _to_port(self, parts: NodeParts, gpu: int, nic: int, direction: int) -> Path:
        """What lies between a GPU and a port of its node."""
        if gpu < 0:
            return (parts.host,)
        if nic in parts.own_nics[gpu]:
            return ()
        return (parts.nvlink[gpu][direction],) if parts.nvlink else (parts.pcie[gpu][direction],)

    def _crossed(self, a: str, b: str) -> Path:
        """Shared links between two groups, the direction of the bytes."""
        out = []
        for side_a, side_b, ports in self._links:
            if a in side_a and b in side_b:
                out.append(ports.out)
            elif a in side_b and b in side_a:
                out.append(ports.into)
        return tuple(out)

    def node_index(self, host: str) -> int:
        """Index of a node by its name.

        Raises:
            ConfigError: no rank runs on such a node.
        """
        if host not in self.names:
            raise ConfigError(f"node {host!r} has no rank of this plan; there are {_some(self.names)}")
        return self.names.index(host)

    def lose_port(self, node: int, nic: int) -> set[int]:
        """Forget a port; returns its resources."""
        lost = set(self.nodes[node].nics[nic])
        self._lost |= lost
        return lost

    def lose_node(self, node: int) -> set[int]:
        """Forget a node; returns all its resources."""
        parts = self.nodes[node]
        pairs = [*parts.nvlink, *parts.pcie, *parts.nics]
        lost = {parts.host, *parts.hbm, *(r for pair in pairs for r in pair)}
        self._lost |= lost
        return lost

    def is_cut_off(self, node: int) -> bool:
        """Whether a node has ports, and none of them works."""
        nics = self.nodes[node].nics
        return bool(nics) and all(n.out in self._lost for n in nics)


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
