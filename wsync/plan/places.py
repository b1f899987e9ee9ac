"""Lanes, ports, islands and zones: what a rank reaches from where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wsync.spec.cluster import Cluster, NodeGroup

CLOSE = ("PIX", "PXB")
"""Paths of `NicPath` that make a NIC a GPU's own."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One rank's place.

    Attributes:
        node: its node.
        gpu: its GPU there, in order of appearance among the ranks of its side; -1 in a node without GPUs.
        domain: the ranks of a node with equal numbers are one NVLink domain; -1 without NVLink.
        reach: indices of the NICs that it sends and receives on, ascending.
        own: those of ``reach`` that it reaches without NVLink.
        port: index of the port that is ``reach``; -1 if it reaches no NIC.
    """

    node: int
    gpu: int
    domain: int
    reach: tuple[int, ...]
    own: tuple[int, ...]
    port: int = -1


@dataclass(frozen=True, slots=True)
class Port:
    """A set of NICs that some rank reaches.

    Attributes:
        nics: their indices.
        rate_gbps: of all together.
    """

    nics: tuple[int, ...]
    rate_gbps: float


@dataclass(frozen=True, slots=True)
class Zones:
    """How zones are linked.

    Attributes:
        count: how many.
        crossed: ``crossed[a][b]`` are the directed links that bytes from zone a to zone b go through, as
            ``2 * link + direction`` with direction 0 from side_a.
    """

    count: int
    crossed: tuple[tuple[tuple[int, ...], ...], ...]


def find_lanes(node_of: Sequence[int], groups: Sequence[NodeGroup]) -> tuple[Lane, ...]:
    """The lanes of the ranks of one side; ports are not numbered yet."""
    first_nic = [0]
    for group in groups:
        first_nic.append(first_nic[-1] + len(group.nics))
    places = [_gpu_reaches(g) for g in groups]
    seen: dict[int, int] = {}
    lanes = []
    for node in node_of:
        group = groups[node]
        turn = seen.get(node, 0)
        seen[node] = turn + 1
        gpu = turn % group.num_gpus if group.num_gpus else -1
        reach, own = places[node][max(gpu, 0)]
        base = first_nic[node]
        has_nvlink = group.nvlink_domain > 1 and group.nvlink_gbps is not None
        domain = gpu // group.nvlink_domain if has_nvlink else -1
        lanes.append(Lane(node, gpu, domain, tuple(base + i for i in reach), tuple(base + i for i in own)))
    return tuple(lanes)


def _gpu_reaches(group: NodeGroup) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each GPU of a node the NICs that it reaches, and those of them that are its own."""
    every = tuple(range(len(group.nics)))
    if not group.num_gpus:
        return [(every, every)]
    listed = [{p.gpu for p in n.gpus} for n in group.nics]
    size = group.nvlink_domain if group.nvlink_domain > 1 and group.nvlink_gbps is not None else 1
    out = []
    for gpu in range(group.num_gpus):
        peers = set(range(gpu // size * size, (gpu // size + 1) * size))
        reach = tuple(i for i in every if not listed[i] or listed[i] & peers)
        out.append((reach, _own(group, gpu, reach) if size > 1 else reach))
    return out


def _own(group: NodeGroup, gpu: int, reach: tuple[int, ...]) -> tuple[int, ...]:
    """The NICs close to a GPU; where none is said to be, its even share."""
    close = tuple(i for i in reach if any(p.gpu == gpu and p.path in CLOSE for p in group.nics[i].gpus))
    if close or not reach:
        return close
    share = tuple(i for at, i in enumerate(reach) if at * group.num_gpus // len(reach) == gpu)
    return share or (reach[gpu * len(reach) // group.num_gpus],)


def find_ports(
    nic_gbps: Sequence[float], *sides: tuple[Lane, ...]
) -> tuple[tuple[Port, ...], tuple[tuple[Lane, ...], ...]]:
    """Number the sets of NICs that ranks reach, in order of first appearance."""
    index: dict[tuple[int, ...], int] = {}
    numbered = tuple(
        tuple(replace(x, port=index.setdefault(x.reach, len(index))) if x.reach else x for x in side) for side in sides
    )
    ports = tuple(Port(nics, math.fsum(nic_gbps[i] for i in nics)) for nics in index)
    return ports, numbered


def find_islands(
    names: Sequence[str], groups: Sequence[NodeGroup], cluster: Cluster
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The island of each node, and a name for each island."""
    position: dict[str, tuple[str, int]] = {}
    for group in cluster.groups:
        if group.nodes_per_domain > 1:
            position.update({n: (group.name, i // group.nodes_per_domain) for i, n in enumerate(group.node_names)})
    keys = [position.get(n, n) for n in names]
    index = {k: i for i, k in enumerate(dict.fromkeys(keys))}
    labels = tuple(f"node {k}" if isinstance(k, str) else f"NVLink domain {k[1]} of group {k[0]}" for k in index)
    return tuple(index[k] for k in keys), labels


def find_zones(groups: Sequence[NodeGroup], cluster: Cluster) -> tuple[tuple[int, ...], Zones]:
    """The zone of each node: groups on equal sides of every link are one."""
    sides: dict[str, tuple[int, ...]] = {}
    for group in cluster.groups:
        sides[group.name] = tuple(
            0 if group.name in link.side_a else 1 if group.name in link.side_b else -1 for link in cluster.links
        )
    index = {k: i for i, k in enumerate(dict.fromkeys(sides[g.name] for g in groups))}
    crossed = tuple(
        tuple(
            tuple(2 * i + x for i, (x, y) in enumerate(zip(a, b, strict=True)) if x >= 0 and y == 1 - x) for b in index
        )
        for a in index
    )
    return tuple(index[sides[g.name]] for g in groups), Zones(len(index), crossed)
