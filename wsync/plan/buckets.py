"""Buckets: queues of units cut and packed into messages of one size."""

from __future__ import annotations

from fractions import Fraction

from wsync.plan.blocks import Unit
from wsync.plan.geometry import cut_leading
from wsync.plan.routing import Entry, GroupKey, Trees
from wsync.plan.types import ALIGNMENT, Bucket, Piece
from wsync.spec.box import Box


def build_buckets(
    groups: dict[GroupKey, list[Entry]], part_of: list[tuple[int, ...]], trees: Trees, bucket_bytes: int
) -> tuple[Bucket, ...]:
    """Pack every queue, order each sender's buckets so that all its sinks start early, and number them.

    Numbers go round the senders, weights before scales: in order of number a sink takes from all senders in turn.

    Args:
        groups: a sender's units for one set of needers.
        part_of: for each demand the plan's parts.
        trees: makes the hops.
        bucket_bytes: size of a bucket.
    """
    queues: dict[tuple[int, int], list[tuple[Fraction, tuple[int, ...], tuple[Piece, ...]]]] = {}
    for (rank, stage, sinks), entries in sorted(groups.items(), key=lambda g: g[0]):
        packed = pack(entries, part_of, bucket_bytes)
        queue = queues.setdefault((stage, rank), [])
        queue += [(Fraction(i, len(packed)), sinks, pieces) for i, pieces in enumerate(packed)]
    numbered: list[tuple[int, int, int, tuple[int, ...], tuple[Piece, ...]]] = []
    for (stage, rank), queue in queues.items():
        queue.sort(key=lambda q: q[:2])
        numbered += [(stage, turn, rank, sinks, pieces) for turn, (_, sinks, pieces) in enumerate(queue)]
    numbered.sort(key=lambda n: n[:3])
    buckets = []
    for bucket_idx, (stage, _, rank, sinks, pieces) in enumerate(numbered):
        used = _aligned(pieces[-1].offset + pieces[-1].nbytes)
        buckets.append(Bucket(bucket_idx, rank, stage, used, pieces, sinks, trees.hops(sinks, used)))
    return tuple(buckets)


def pack(entries: list[Entry], part_of: list[tuple[int, ...]], bucket_bytes: int) -> list[tuple[Piece, ...]]:
    """Fill one bucket after the other, in order; a unit that does not fit is cut where the bucket ends."""
    out: list[tuple[Piece, ...]] = []
    pieces: list[Piece] = []
    offset = 0
    for entry in entries:
        unit = entry.unit
        part_idx = part_of[entry.demand_idx][unit.part]
        todo: list[tuple[Box, int]] = [(unit.box, unit.nbytes)]
        while todo:
            box, nbytes = todo[-1]
            if offset + nbytes <= bucket_bytes:
                todo.pop()
                pieces.append(Piece(part_idx, entry.shard_idx, box, unit.mode, offset, nbytes))
                offset = _aligned(offset + nbytes)
            elif not _cut(todo, unit, bucket_bytes - offset, bucket_bytes):
                out.append(tuple(pieces))
                pieces, offset = [], 0
    if pieces:
        out.append(tuple(pieces))
    return out


def _cut(todo: list[tuple[Box, int]], unit: Unit, room: int, capacity: int) -> bool:
    """Replace the last box of ``todo`` by a part that fits into ``room`` and the rest; False if none does."""
    cut = cut_leading(todo[-1][0], unit.elem_bytes, room, capacity, unit.step)
    if cut is None:
        return False
    todo.pop()
    todo += [(b, b.num_elements * unit.elem_bytes) for b in (*reversed(cut[1]), cut[0])]
    return True


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
