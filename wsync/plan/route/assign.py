"""Who sends each leg: first which port it leaves by, then which rank behind that port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.route.balance import balance
from wsync.plan.route.survey import Leg

MACHINE_RATE = 10**21
"""Speeds are this over a cost in attoseconds, so that whole numbers keep their precision."""


class Load(NamedTuple):
    """A part of a leg, and the trainer rank that sends it."""

    leg_idx: int
    rank: int
    nbytes: int


class _Part(NamedTuple):
    leg_idx: int
    ranks: tuple[int, ...]
    nbytes: int


def assign(
    legs: Sequence[Leg], copies: Sequence[int], nodes: Nodes, speed: Sequence[int], bucket_bytes: int
) -> list[Load]:
    """Split legs among their candidates so that the busiest port, then the busiest rank, is done as early as can be.

    Args:
        legs: of all groups.
        copies: how often the sender of each leg sends it.
        nodes: of the job.
        speed: bytes per second of each port.
        bucket_bytes: legs are cut at multiples of this.
    """
    parts = _by_port(legs, copies, nodes, speed, bucket_bytes)
    rank_speed = [MACHINE_RATE // byte_cost(nodes.groups[n].local_gbps) for n in nodes.source_node]
    work = [(p.nbytes * copies[p.leg_idx], p.ranks) for p in parts]
    shares = _shares(work, [0] * len(rank_speed), rank_speed)
    out = []
    for i, cuts in enumerate(_cut(work, shares, [copies[p.leg_idx] for p in parts], bucket_bytes)):
        out += [Load(parts[i].leg_idx, rank, nbytes) for rank, nbytes in cuts]
    return out


def _by_port(
    legs: Sequence[Leg], copies: Sequence[int], nodes: Nodes, speed: Sequence[int], bucket_bytes: int
) -> list[_Part]:
    remote = [i for i, leg in enumerate(legs) if not leg.family.local]
    work = [(legs[i].nbytes * copies[i], tuple(legs[i].senders.by_port)) for i in remote]
    shares = _shares(work, [0] * len(speed), speed)
    cuts_of = dict(zip(remote, _cut(work, shares, [copies[i] for i in remote], bucket_bytes), strict=True))
    out = []
    for i, leg in enumerate(legs):
        if leg.family.local:
            out.append(_Part(i, leg.senders.ranks, leg.nbytes))
        else:
            out += [_Part(i, leg.senders.by_port[port], nbytes) for port, nbytes in cuts_of[i]]
    return out


def _shares(
    work: Sequence[tuple[int, tuple[int, ...]]], load: list[int], speed: Sequence[int]
) -> dict[tuple[int, ...], dict[int, int]]:
    """What each machine should take of all work with the same candidates."""
    total: dict[tuple[int, ...], int] = {}
    for amount, machines in work:
        total[machines] = total.get(machines, 0) + amount
    keys = list(total)
    return dict(zip(keys, balance([(total[k], k) for k in keys], load, speed), strict=True))


def _cut(
    work: Sequence[tuple[int, tuple[int, ...]]],
    shares: dict[tuple[int, ...], dict[int, int]],
    copies: Sequence[int],
    bucket_bytes: int,
) -> list[list[tuple[int, int]]]:
    """Hand out each share in order of work, so that little of it is cut: (machine, bytes sent once) of every piece."""
    left = {k: sorted(([m, x] for m, x in s.items()), reverse=True) for k, s in shares.items()}
    out: list[list[tuple[int, int]]] = []
    for (amount, machines), count in zip(work, copies, strict=True):
        if len(machines) == 1:
            out.append([(machines[0], amount // count)])
            continue
        out.append(_take(left[machines], amount // count, count, bucket_bytes))
    return out


def _take(queue: list[list[int]], nbytes: int, count: int, bucket_bytes: int) -> list[tuple[int, int]]:
    """One piece from the front of a queue of [machine, bytes that it should still take]."""
    cuts: list[tuple[int, int]] = []
    while nbytes:
        machine, room = queue[-1]
        take = nbytes if len(queue) == 1 else _rounded(room // count, nbytes, bucket_bytes)
        if take:
            cuts.append((machine, take))
            queue[-1][1] -= take * count
            nbytes -= take
        if nbytes:
            queue.pop()
    return cuts


def _rounded(room: int, nbytes: int, bucket_bytes: int) -> int:
    """Of ``nbytes`` the part nearest to ``room``: whole buckets, or all or nothing of less than one."""
    if nbytes <= bucket_bytes:
        return nbytes if 2 * room >= nbytes else 0
    return min(nbytes, max(0, room + bucket_bytes // 2) // bucket_bytes * bucket_bytes)
