"""Lanes, ports, islands and zones: what a rank reaches from where it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.spec.cluster import Cluster, NodeGroup

CLOSE = ("PIX", "PXB")
"""Paths of `NicPath` that make a NIC a GPU's own."""


class Place(NamedTuple):
    """One GPU."""

    node: int
    gpu: int


@dataclass(frozen=True, slots=True)
class Lane:
    """One rank's place.

    Attributes:
        node: its node.
        gpu: its GPU there, as `number_gpus` says; -1 in a node without GPUs.
        domain: the ranks of a node with equal numbers are one NVLink domain; -1 without NVLink.
        reach: indices of the NICs that it sends and receives on, ascending.
        own: those of ``reach`` that it reaches without NVLink.
        port: index of the port that is ``reach``; -1 if it reaches no NIC.
        offloaded: a trainer rank whose weights are in the memory of its node and cross PCIe to its GPU to be packed.
        in_host: an engine rank that keeps what it receives in the memory of its node, sends it on from there, and
            brings it to its GPU over PCIe when it installs it.
    """

    node: int
    gpu: int
    domain: int
    reach: tuple[int, ...]
    own: tuple[int, ...]
    port: int = -1
    offloaded: bool = False
    in_host: bool = False


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


def find_lanes(node_of: Sequence[int], gpu_of: Sequence[int], groups: Sequence[NodeGroup]) -> tuple[Lane, ...]:
    """The lanes of the ranks of one side; ports are not numbered yet."""
    first_nic = [0]
    for group in groups:
        first_nic.append(first_nic[-1] + len(group.nics))
    places = [_gpu_reaches(g) for g in groups]
    lanes = []
    for node, gpu in zip(node_of, gpu_of, strict=True):
        group = groups[node]
        reach, own = places[node][max(gpu, 0)]
        base = first_nic[node]
        has_nvlink = group.nvlink_domain > 1 and group.nvlink_gbps is not None
        domain = gpu // group.nvlink_domain if has_nvlink else -1
        lanes.append(Lane(node, gpu, domain, tuple(base + i for i in reach), tuple(base + i for i in own)))
    return tuple(lanes)


def number_gpus(
    sources: Sequence[tuple[int, int | None]], sinks: Sequence[tuple[int, int | None]], groups: Sequence[NodeGroup]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The GPU of each rank of both sides, given its node and what it says itself.

    Ranks that say nothing get the GPUs of their node that no rank names, trainer ranks first, if there are enough for
    both sides. Else the sides share GPUs: each is numbered by itself, from 0.

    Raises:
        ConfigError: a rank names a GPU that its node does not have.
    """
    named: dict[int, set[int]] = {}
    silent: dict[int, int] = {}
    for what, side in (("trainer rank", sources), ("sink", sinks)):
        for i, (node, gpu) in enumerate(side):
            if gpu is None:
                silent[node] = silent.get(node, 0) + 1
            elif groups[node].num_gpus:
                check_gpu(f"{what} {i}", gpu, groups[node])
                named.setdefault(node, set()).add(gpu)
    free = {n: [g for g in range(groups[n].num_gpus) if g not in named.get(n, ())] for n in silent}
    together = {n: iter(free[n]) for n, count in silent.items() if count <= len(free[n])}
    return _numbered(sources, groups, together), _numbered(sinks, groups, together)


def _numbered(
    side: Sequence[tuple[int, int | None]], groups: Sequence[NodeGroup], together: Mapping[int, Iterator[int]]
) -> tuple[int, ...]:
    turns: dict[int, int] = {}
    out = []
    for node, gpu in side:
        num_gpus = groups[node].num_gpus
        if not num_gpus:
            gpu = -1
        elif gpu is None and node in together:
            gpu = next(together[node])
        elif gpu is None:
            gpu = turns.get(node, 0) % num_gpus
            turns[node] = turns.get(node, 0) + 1
        out.append(gpu)
    return tuple(out)


def check_gpu(what: str, gpu: int, group: NodeGroup) -> None:
    """Refuse a GPU that a node does not have.

    Raises:
        ConfigError: it names the GPU, ``what`` says that it runs there, and those of the node.
    """
    if not 0 <= gpu < group.num_gpus:
        raise ConfigError(
            f"{what} says that it runs on GPU {gpu}, but nodes of group {group.name!r} have GPUs 0 to "
            f"{group.num_gpus - 1}",
            hint="correct gpu in the rank's RankInfo (wsync describe --gpus, --hosts), or num_gpus in the cluster file",
        )


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
