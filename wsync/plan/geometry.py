"""Boxes cut by boxes: the intersections that blocks are made of. Plain integers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from wsync.plan.types import MODE_FUSED, MODE_SCALED
from wsync.spec.box import Box

K = TypeVar("K", bound=Hashable)

_Fragment = tuple[tuple[int, ...], tuple[int, ...], int]


def bits(mask: int) -> Iterator[int]:
    """Indices of the set bits of ``mask``, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def partition(boxes: Sequence[Box], needed: int) -> list[tuple[Box, int]]:
    """Cut space into disjoint boxes, each inside or outside every one of ``boxes`` as a whole.

    Sweeps one dimension after the other; equal sets of open boxes share the sweep of the inner dimensions, so that
    the cost follows the number of distinct sets and not the product of the cut lines.

    Args:
        boxes: of one rank (number of dimensions); empty ones cover nothing.
        needed: mask of box indices; space outside all of them is left out.

    Returns:
        (box, mask of the indices of ``boxes`` that cover it), in order of offset, joined where masks are equal.
    """
    ndim = len(boxes[0].shape) if boxes else 0
    ends = [b.end for b in boxes]
    memo: dict[tuple[int, int], list[_Fragment]] = {}

    def sweep(dim: int, mask: int) -> list[_Fragment]:
        if dim == ndim:
            return [((), (), mask)]
        found = memo.get((dim, mask))
        if found is not None:
            return found
        toggles: dict[int, int] = {}
        for i in bits(mask):
            bit = 1 << i
            begin, end = boxes[i].offset[dim], ends[i][dim]
            toggles[begin] = toggles.get(begin, 0) ^ bit
            toggles[end] = toggles.get(end, 0) ^ bit
        found = []
        active, since = 0, 0
        for at in sorted(toggles):
            if active & needed:
                for offset, shape, cover in sweep(dim + 1, active):
                    found.append(((since, *offset), (at - since, *shape), cover))
            active ^= toggles[at]
            since = at
        memo[(dim, mask)] = found
        return found

    filled = sum(1 << i for i, b in enumerate(boxes) if b.num_elements)
    if not filled & needed:
        return []
    return joined([(Box(o, s), cover) for o, s, cover in sweep(0, filled) if cover & needed])


def joined(parts: Iterable[tuple[Box, K]]) -> list[tuple[Box, K]]:
    """Join neighbours of equal key until no two boxes that differ in one dimension only can be joined."""
    current = list(parts)
    while True:
        before = len(current)
        for dim in reversed(range(len(current[0][0].shape) if current else 0)):
            current = _joined_along(current, dim)
        if len(current) == before:
            return sorted(current, key=lambda p: p[0].offset)


def _joined_along(parts: list[tuple[Box, K]], dim: int) -> list[tuple[Box, K]]:
    rows: dict[tuple[object, ...], list[tuple[Box, K]]] = {}
    for box, key in parts:
        o, s = box.offset, box.shape
        rows.setdefault((key, o[:dim], o[dim + 1 :], s[:dim], s[dim + 1 :]), []).append((box, key))
    out: list[tuple[Box, K]] = []
    for row in rows.values():
        row.sort(key=lambda p: p[0].offset[dim])
        last, key = row[0]
        for box, _ in row[1:]:
            if last.offset[dim] + last.shape[dim] == box.offset[dim]:
                shape = (*last.shape[:dim], last.shape[dim] + box.shape[dim], *last.shape[dim + 1 :])
                last = Box(last.offset, shape)
            else:
                out.append((last, key))
                last = box
        out.append((last, key))
    return out


def replaced(box: Box, dim: int, begin: int, end: int) -> Box:
    """``box`` with the interval ``begin`` to ``end`` in one dimension."""
    return Box(
        (*box.offset[:dim], begin, *box.offset[dim + 1 :]), (*box.shape[:dim], end - begin, *box.shape[dim + 1 :])
    )


def split_modes(box: Box, shape: tuple[int, ...], block: tuple[int, int]) -> list[tuple[Box, int]]:
    """Split a weight's box into its whole scale blocks (MODE_FUSED) and strips of cut ones (MODE_SCALED).

    A block that the tensor's own edge clips is whole if the box reaches that edge. At most five boxes come back: the
    core, the strips above and below it over the full width, and those left and right of it.
    """
    rows, cols = len(shape) - 2, len(shape) - 1
    core = box
    for dim, step in ((rows, block[0]), (cols, block[1])):
        begin = -(-box.offset[dim] // step) * step
        end = box.end[dim]
        end = end if end == shape[dim] else end // step * step
        if begin >= end:
            return [(box, MODE_SCALED)]
        core = replaced(core, dim, begin, end)
    out = [(core, MODE_FUSED)]
    middle = replaced(box, rows, core.offset[rows], core.end[rows])
    for outer, dim in ((box, rows), (middle, cols)):
        for begin, end in ((outer.offset[dim], core.offset[dim]), (core.end[dim], outer.end[dim])):
            if begin < end:
                out.append((replaced(outer, dim, begin, end), MODE_SCALED))
    return sorted(out, key=lambda p: p[0].offset)


def owned_cells(box: Box, block: tuple[int, int]) -> Box:
    """The scale cells whose first weight element is inside ``box``."""
    return _on_grid(box, block, lambda x, step: -(-x // step))


def touched_cells(box: Box, block: tuple[int, int]) -> Box:
    """The scale cells of which at least one weight element is inside ``box``, which is not empty."""
    begin = _on_grid(box, block, lambda x, step: x // step)
    end = owned_cells(box, block).end
    return Box(begin.offset, tuple(e - o for o, e in zip(begin.offset, end, strict=True)))


def _on_grid(box: Box, block: tuple[int, int], rounded: Callable[[int, int], int]) -> Box:
    steps = (1,) * (len(box.shape) - 2) + block
    offset = tuple(rounded(o, step) for o, step in zip(box.offset, steps, strict=True))
    end = tuple(rounded(e, step) for e, step in zip(box.end, steps, strict=True))
    return Box(offset, tuple(e - o for o, e in zip(offset, end, strict=True)))


def weights_of_cells(cells: Box, shape: tuple[int, ...], block: tuple[int, int]) -> Box:
    """The weight elements that a box of scale cells describes, clipped by the tensor's edge."""
    steps = (1,) * (len(shape) - 2) + block
    offset = tuple(o * step for o, step in zip(cells.offset, steps, strict=True))
    end = tuple(min(e * step, n) for e, step, n in zip(cells.end, steps, shape, strict=True))
    return Box(offset, tuple(e - o for o, e in zip(offset, end, strict=True)))


def cut_leading(
    box: Box, elem_bytes: int, room: int, capacity: int, step: tuple[int, int]
) -> tuple[Box, list[Box]] | None:
    """Cut off the largest leading part of ``box`` that fits into ``room`` bytes.

    The outermost dimension is cut where one step of it fits into an empty bucket, otherwise the next one, within one
    step of the outer.

    Args:
        box: does not fit as a whole.
        elem_bytes: of one element on the wire.
        room: bytes left in the open bucket.
        capacity: bytes of an empty bucket.
        step: cuts in the last two dimensions (rows, columns) fall on multiples of these.

    Returns:
        The part that fits and what remains, in order; or None where a new bucket has to be opened first.
    """
    rest: list[Box] = []
    ndim = len(box.shape)
    for dim in range(ndim):
        grid = step[dim - ndim] if dim >= ndim - 2 else 1
        begin, end = box.offset[dim], box.end[dim]
        inner = elem_bytes * math.prod(box.shape[:dim]) * math.prod(box.shape[dim + 1 :])  # outer ones are one step
        first = min(begin // grid * grid + grid, end)
        if (first - begin) * inner <= capacity:
            stop = begin + room // inner
            stop = end if stop >= end else stop // grid * grid
            if stop <= begin:
                return None
            if stop < end:
                rest.insert(0, replaced(box, dim, stop, end))
            return replaced(box, dim, begin, stop), rest
        if first < end:
            rest.insert(0, replaced(box, dim, first, end))
        box = replaced(box, dim, begin, first)
    return None
