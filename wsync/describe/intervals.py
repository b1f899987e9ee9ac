"""Which indices of a dimension a rank holds, from its placements and mesh coordinates. Pure integers, no torch.

A dimension is split by the mesh axes that shard it, each time as `torch.chunk` does: pieces of ``ceil(n / parts)``,
the last ones shorter or empty. Plain ``Shard`` placements are applied from left to right.
``_StridedShard(split_factor)`` says that the dimension had been split into ``split_factor`` pieces before, by axes that
stand further right:

- where the split factors name such an order (FSDP2 over TP does), the axes are applied in that order, which gives
  one interval also for uneven sizes;
- where they do not (a fused ``q|k|v`` weight, sharded piece by piece), each of the ``split_factor`` pieces is chunked
  and a rank holds its share of every piece: several intervals.

Source: ``DTensorSpec._maybe_convert_StridedShard_to_shard_order`` and ``_StridedShard._split_tensor`` of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Interval = tuple[int, int]
"""First index and the index behind the last."""


class Split(NamedTuple):
    """One mesh axis that shards a dimension.

    Attributes:
        coordinate: of this rank on the axis.
        num_parts: size of the axis.
        split_factor: 1 for ``Shard``, else that of ``_StridedShard``.
    """

    coordinate: int
    num_parts: int
    split_factor: int = 1


def chunk_bounds(extent: int, num_parts: int, index: int) -> Interval:
    """Where part ``index`` of `torch.chunk` begins and ends; empty parts begin and end at ``extent``."""
    size = -(-extent // num_parts)
    return min(index * size, extent), min((index + 1) * size, extent)


def local_intervals(extent: int, splits: Sequence[Split], order: Sequence[int] | None = None) -> tuple[Interval, ...]:
    """The intervals of ``range(extent)`` that a rank holds, in the order in which its local tensor stores them.

    Args:
        extent: global size of the dimension.
        splits: the mesh axes that shard it, in order of the mesh.
        order: positions in ``splits`` in the order in which they were applied; derived from the split factors if None.
    """
    if order is None:
        order = split_order(splits)
    held: list[Interval] = [(0, extent)]
    if order is not None:
        for position in order:
            held = _chunk(held, splits[position].num_parts, splits[position].coordinate)
    else:
        for split in splits:
            pieces = [_chunk(held, split.split_factor, i) for i in range(split.split_factor)]
            held = [part for piece in pieces for part in _chunk(piece, split.num_parts, split.coordinate)]
    return _joined(held)


def split_order(splits: Sequence[Split]) -> list[int] | None:
    """The order in which the axes were applied, as the split factors tell it, or None where they tell none."""
    order: list[int] = []
    for position in reversed(range(len(splits))):
        pieces_before = 1
        for slot in range(len(order) + 1):
            if pieces_before == splits[position].split_factor:
                order.insert(slot, position)
                break
            if slot < len(order):
                pieces_before *= splits[order[slot]].num_parts
        else:
            return None
    return order


def _chunk(held: list[Interval], num_parts: int, index: int) -> list[Interval]:
    """Part ``index`` of what is held, as if the intervals stood side by side."""
    first, last = chunk_bounds(sum(stop - start for start, stop in held), num_parts, index)
    taken: list[Interval] = []
    position = 0
    for start, stop in held:
        low = max(first - position, 0)
        high = min(last - position, stop - start)
        if low < high:
            taken.append((start + low, start + high))
        position += stop - start
    return taken


def _joined(held: list[Interval]) -> tuple[Interval, ...]:
    """The same indices with neighbours joined."""
    joined: list[Interval] = []
    for start, stop in held:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)
