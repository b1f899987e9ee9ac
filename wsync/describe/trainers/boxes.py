"""Boxes of a tensor that ranks hold, from intervals of its dimensions and of its flattened elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from wsync.describe.intervals import Interval
from wsync.spec.box import Box


def cut(shape: tuple[int, ...], cuts: Mapping[int, Sequence[Interval]]) -> tuple[Box, ...]:
    """The boxes of a tensor that has only some intervals of some dimensions; none where that is empty."""
    held = [list(cuts.get(dim, ((0, extent),))) for dim, extent in enumerate(shape)]
    boxes = []
    for chosen in itertools.product(*held):
        box = Box(tuple(begin for begin, _ in chosen), tuple(end - begin for begin, end in chosen))
        if box.num_elements:
            boxes.append(box)
    return tuple(boxes)


def flat_range(shape: tuple[int, ...], begin: int, end: int) -> tuple[Box, ...]:
    """The boxes that elements ``begin`` to ``end`` of the flattened tensor make, in this order.

    A range of an n-dimensional tensor is at most ``2n - 1`` boxes: the rest of a row, whole rows, the start of a row,
    in each dimension.
    """
    begin, end = max(begin, 0), min(end, math.prod(shape))
    if begin >= end:
        return ()
    if not shape:
        return (Box((), ()),)
    inner = math.prod(shape[1:])
    first, last = -(-begin // inner), end // inner
    if first > last:  # inside one row
        return _in_row(shape, last, begin - last * inner, end - last * inner)
    head = _in_row(shape, first - 1, begin - (first - 1) * inner, inner) if begin < first * inner else ()
    body = cut(shape, {0: [(first, last)]}) if first < last else ()
    tail = _in_row(shape, last, 0, end - last * inner) if last * inner < end else ()
    return (*head, *body, *tail)


def _in_row(shape: tuple[int, ...], row: int, begin: int, end: int) -> tuple[Box, ...]:
    return tuple(Box((row, *b.offset), (1, *b.shape)) for b in flat_range(shape[1:], begin, end))
