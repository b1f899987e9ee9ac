"""Cuts between host memory and GPUs: what is kept in host memory crosses PCIe, and the memory of its node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wsync.plan.cuts.tally import Tally
from wsync.plan.nodes import Nodes
from wsync.plan.places import Place

MAX_SETS = 600
"""Of more sets of GPUs, or of nodes, only single ones and all together are looked at."""

Members = frozenset[int]


def staged_cuts(total: Tally, nodes: Nodes) -> Iterator[tuple[str, int, float]]:
    """(name, bytes, GB/s) of GPUs that bytes reach over PCIe only, and of nodes by whose memory bytes have to pass.

    Source: ``staged = bytes / PCIe rate``. Weights in host memory are read there once to be packed, by one of those
    that hold them; what an engine rank keeps in host memory is written there once, and read once to be installed.
    """
    if not total.gathered and not nodes.has_in_host:
        return
    gpus: list[Place] = sorted({Place(x.node, x.gpu) for x in (*nodes.sources, *nodes.sinks)})
    number = {place: i for i, place in enumerate(gpus)}
    by_gpus: dict[Members, int] = {}
    by_nodes: dict[Members, int] = {}
    for places, nbytes in total.gathered.items():
        _add(by_gpus, [number[p] for p in places], nbytes)
        _add(by_nodes, [p.node for p in places], nbytes)
    for lane, nbytes in zip(nodes.sinks, total.sink_bytes, strict=True):
        if lane.in_host:
            _add(by_gpus, [number[Place(lane.node, lane.gpu)]], nbytes)
            _add(by_nodes, [lane.node], 2 * nbytes)
    groups = nodes.groups
    for members, nbytes in _sums(by_gpus):
        first = gpus[min(members)]
        rate = sum(groups[gpus[i].node].pcie_gbps or groups[gpus[i].node].host_gbps for i in sorted(members))
        yield (
            f"staged through PCIe of GPU {first.gpu} of node {nodes.names[first.node]}{_others(members)}",
            nbytes,
            rate,
        )
    for members, nbytes in _sums(by_nodes):
        # The rate of host memory is that of a copy, which reads and writes; these bytes are read or written.
        rate = sum(2 * groups[i].host_gbps for i in sorted(members))
        yield f"staged through host memory of node {nodes.names[min(members)]}{_others(members)}", nbytes, rate


def _add(by_set: dict[Members, int], members: list[int], nbytes: int) -> None:
    key = frozenset(members)
    by_set[key] = by_set.get(key, 0) + nbytes


def _sums(by_set: Mapping[Members, int]) -> Iterator[tuple[Members, int]]:
    """What may pass by one of a set, summed over the sets inside each set that is looked at."""
    looked_at = list(by_set) if len(by_set) <= MAX_SETS else [s for s in by_set if len(s) == 1]
    for members in dict.fromkeys([*looked_at, Members().union(*by_set)]):
        one = len(members) == 1
        yield members, by_set[members] if one else sum(n for s, n in by_set.items() if s <= members)


def _others(members: Members) -> str:
    count = len(members) - 1
    return f" and of {count} other{'s' * (count > 1)}" if count else ""
