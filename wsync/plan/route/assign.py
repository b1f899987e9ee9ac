"""Who sends each leg: first which port it leaves by, then which rank behind that port."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.route.balance import balance
from wsync.plan.route.relays import GRAIN, Fans
from wsync.plan.route.survey import Bundle, Leg

MACHINE_RATE = 10**21
"""Speeds are this over a cost in attoseconds, so that whole numbers keep their precision."""
LOCAL_PORT = -1

Cut = Callable[[list[list[int]], int, int, int], list[tuple[int, int]]]
"""`take`, or `spread`."""


class Load(NamedTuple):
    """A part of a leg, and the trainer rank that sends it."""

    leg_idx: int
    rank: int
    nbytes: int


@dataclass(eq=False, slots=True)
class Run:
    """What leaves by one port for one bundle, in order.

    Attributes:
        bundle_idx: which bundle.
        port: that it leaves by; `LOCAL_PORT` if none.
        loads: in order.
        nbytes: of all loads.
    """

    bundle_idx: int
    port: int
    loads: list[Load] = field(default_factory=list)
    nbytes: int = 0


def assign(legs: Sequence[Leg], bundles: Sequence[Bundle], fans: Fans, nodes: Nodes, bucket_bytes: int) -> list[Run]:
    """Split bundles among their candidates so that the busiest port, then the busiest rank, is done as early as can be.

    Args:
        legs: of all groups.
        bundles: of the legs.
        fans: how often the sender of each bundle sends it.
        nodes: of the job.
        bucket_bytes: legs are cut at multiples of this.
    """
    # Behind a port every rank has its own PCIe: what comes over it is spread over the ports leg by leg, and with that
    # over their ranks, where else whole legs fill one port after the other and fewer pieces are cut.
    runs = _by_port(legs, bundles, fans, bucket_bytes, spread if nodes.has_offloaded else take)
    rank_speed = [MACHINE_RATE // byte_cost(nodes.groups[n].local_gbps) for n in nodes.source_node]
    load = [0] * len(rank_speed)
    queues = _rank_queues(runs, legs, load, rank_speed)
    for run in runs:
        loads: list[Load] = []
        for leg_idx, _, nbytes in run.loads:
            ranks = _ranks(legs[leg_idx], run.port)
            if len(ranks) == 1:
                loads.append(Load(leg_idx, ranks[0], nbytes))
            else:
                loads += [Load(leg_idx, rank, n) for rank, n in take(queues[ranks], nbytes, bucket_bytes)]
        run.loads = loads
    return runs


def _ranks(leg: Leg, port: int) -> tuple[int, ...]:
    return leg.senders.ranks if port == LOCAL_PORT else leg.senders.by_port[port]


def _rank_queues(
    runs: Sequence[Run], legs: Sequence[Leg], load: list[int], speed: Sequence[int]
) -> dict[tuple[int, ...], list[list[int]]]:
    total: dict[tuple[int, ...], int] = {}
    for run in runs:
        for leg_idx, _, nbytes in run.loads:
            ranks = _ranks(legs[leg_idx], run.port)
            if len(ranks) > 1:
                total[ranks] = total.get(ranks, 0) + nbytes
            else:
                load[ranks[0]] += nbytes
    shares = balance([(n, k) for k, n in total.items()], load, speed)
    return {k: _queue(s) for k, s in zip(total, shares, strict=True)}


def _by_port(legs: Sequence[Leg], bundles: Sequence[Bundle], fans: Fans, bucket_bytes: int, cut: Cut) -> list[Run]:
    work = [(b.nbytes * fans.of[i].source // GRAIN, b.ports) for i, b in enumerate(bundles) if not b.family.local]
    total: dict[tuple[int, ...], int] = {}
    for amount, ports in work:
        total[ports] = total.get(ports, 0) + amount
    shares = balance([(n, k) for k, n in total.items()], list(fans.load), fans.speed)
    queues = {k: _queue(x) for k, x in zip(total, shares, strict=True)}
    out = []
    for i, bundle in enumerate(bundles):
        if len(bundle.ports) < 2:
            run = Run(i, bundle.ports[0] if bundle.ports else LOCAL_PORT, nbytes=bundle.nbytes)
            run.loads = [Load(x, -1, legs[x].nbytes) for x in bundle.legs]
            out.append(run)
        else:
            queue = _queue(fans.split[i]) if i in fans.split else queues[bundle.ports]
            out += _cut_bundle(i, bundle, legs, queue, fans.of[i].source, bucket_bytes, cut)
    return out


def _cut_bundle(
    idx: int, bundle: Bundle, legs: Sequence[Leg], queue: list[list[int]], source: int, bucket_bytes: int, cut: Cut
) -> list[Run]:
    runs: dict[int, Run] = {}
    for leg_idx in bundle.legs:
        for port, nbytes in cut(queue, legs[leg_idx].nbytes, bucket_bytes, source):
            run = runs.get(port)
            if run is None:
                run = runs[port] = Run(idx, port)
            run.loads.append(Load(leg_idx, -1, nbytes))
            run.nbytes += nbytes
    return list(runs.values())


def _queue(shares: dict[int, int]) -> list[list[int]]:
    return sorted(([m, x] for m, x in shares.items()), reverse=True) or [[-1, 0]]


def take(queue: list[list[int]], nbytes: int, bucket_bytes: int, source: int = GRAIN) -> list[tuple[int, int]]:
    """One piece from the end of a queue of [machine, bytes that it should still send]; ``source`` copies of it."""
    cuts: list[tuple[int, int]] = []
    while nbytes:
        last = queue[-1]
        room = last[1] * GRAIN // source
        part = nbytes if len(queue) == 1 or nbytes <= room else _rounded(room, nbytes, bucket_bytes)
        if part:
            cuts.append((last[0], part))
            last[1] -= part * source // GRAIN
            nbytes -= part
        if nbytes:
            # What this machine took too much of, or was spared, the next one makes up for.
            rest = queue.pop()[1]
            queue[-1][1] += rest
    return cuts


def spread(queue: list[list[int]], nbytes: int, bucket_bytes: int, source: int = GRAIN) -> list[tuple[int, int]]:
    """As `take`, but a part from each machine, as large as what it should still send is of what all should."""
    total = sum(max(0, x) for _, x in queue)
    cuts, left = [], nbytes
    for last in sorted(queue, key=lambda entry: (-entry[1], entry[0])):
        fair = -(-nbytes * max(0, last[1]) // total) if total else nbytes
        part = min(left, -(-fair // bucket_bytes) * bucket_bytes)
        if part:
            cuts.append((last[0], part))
            last[1] -= part * source // GRAIN
            left -= part
    if left:
        port, part = cuts.pop()
        cuts.append((port, part + left))
    return cuts


def _rounded(room: int, nbytes: int, bucket_bytes: int) -> int:
    """Of ``nbytes`` the part nearest to ``room``: whole buckets, or all or nothing of less than one."""
    if nbytes <= bucket_bytes:
        return nbytes if 2 * room >= nbytes else 0
    return min(nbytes, max(0, room + bucket_bytes // 2) // bucket_bytes * bucket_bytes)
