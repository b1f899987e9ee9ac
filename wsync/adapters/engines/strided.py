"""Strided maps to boxes: a copy between two strided views, in the coordinates of one side. Pure integers, no torch.

A copy is a set of axes, each with an extent and one stride on either side. The *near* side is flat memory that is a
contiguous tensor of a known shape (a checkpoint tensor, or a buffer that the loader made); `box_runs` says the copy as
boxes of that shape, each with one stride of the *far* side for every dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wsync.errors import RecordError
from wsync.spec.box import Box, contiguous_strides

MAX_RUNS = 1 << 16
"""Boxes that one copy may fall into."""


class Axis(NamedTuple):
    """One axis of a copy: ``extent`` steps of ``near`` elements on one side and ``far`` on the other."""

    extent: int
    near: int
    far: int


class BoxRun(NamedTuple):
    """A box of the near side, and where its elements are on the far side.

    Attributes:
        box: in the near side's coordinates.
        offset: element of the far side for the box's first element.
        strides: of the far side, one for each dimension; 0 where the extent is 1.
    """

    box: Box
    offset: int
    strides: tuple[int, ...]


class _Piece(NamedTuple):
    near: int
    far: int
    axes: tuple[Axis, ...]


def box_runs(
    shape: tuple[int, ...], near_offset: int, far_offset: int, axes: Iterable[Axis], *, limit: int = MAX_RUNS
) -> list[BoxRun]:
    """Say a copy as boxes of a contiguous near side of ``shape``.

    Axes that lie in one dimension become one where they can (a view that merged dimensions); an axis that crosses
    dimensions is cut at their edges; what has a step on the near side, or interleaves, becomes a box for each index.

    Raises:
        RecordError: more than ``limit`` boxes.
    """
    todo = [_Piece(near_offset, far_offset, tuple(a for a in axes if a.extent != 1))]
    if any(a.extent == 0 for a in todo[0].axes):
        return []
    runs: list[BoxRun] = []
    while todo:
        if len(runs) + len(todo) > limit:
            raise RecordError(f"a copy falls into more than {limit} boxes of a tensor of shape {shape}")
        outcome = _place(shape, todo.pop())
        if isinstance(outcome, BoxRun):
            runs.append(outcome)
        else:
            todo.extend(reversed(outcome))
    return runs


def subtract(box: Box, hole: Box) -> list[Box]:
    """What is left of ``box`` without ``hole``, which lies inside it, as boxes that do not overlap."""
    left: list[Box] = []
    offset, end = list(box.offset), list(box.end)
    for d in range(len(box.shape)):
        for low, high in ((offset[d], hole.offset[d]), (hole.end[d], end[d])):
            if low < high:
                first = (*offset[:d], low, *offset[d + 1 :])
                last = (*end[:d], high, *end[d + 1 :])
                left.append(Box(first, tuple(b - a for a, b in zip(first, last, strict=True))))
        offset[d], end[d] = hole.offset[d], hole.end[d]
    return left


def joined(runs: Sequence[BoxRun]) -> list[BoxRun]:
    """The same copies in fewer boxes: neighbours become one where the far side goes on at one stride.

    The boxes must not overlap; they come back in another order.
    """
    found = list(runs)
    for dim in reversed(range(len(found[0].box.shape) if found else 0)):
        if len(found) < 2:
            break
        found.sort(key=lambda run: _row_key(run, dim))
        grown: list[BoxRun] = []
        for run in found:
            one = _together(grown[-1], run, dim) if grown else None
            if one is None:
                grown.append(run)
            else:
                grown[-1] = one
        found = grown
    return found


def _row_key(run: BoxRun, dim: int) -> tuple[tuple[int, ...], ...]:
    """Sorts boxes that lie in one row along a dimension next to each other."""
    (offset, shape), strides = (run.box.offset, run.box.shape), run.strides
    others = [v[:dim] + v[dim + 1 :] for v in (offset, shape, strides)]
    return (*others, (offset[dim],))


def _together(a: BoxRun, b: BoxRun, dim: int) -> BoxRun | None:
    if _row_key(a, dim)[:-1] != _row_key(b, dim)[:-1] or a.box.end[dim] != b.box.offset[dim]:
        return None
    extents = (a.box.shape[dim], b.box.shape[dim])
    distance = b.offset - a.offset
    if distance <= 0 or distance % extents[0]:
        return None
    stride = distance // extents[0]
    if any(n > 1 and run.strides[dim] != stride for n, run in zip(extents, (a, b), strict=True)):
        return None
    shape = (*a.box.shape[:dim], sum(extents), *a.box.shape[dim + 1 :])
    return BoxRun(Box(a.box.offset, shape), a.offset, (*a.strides[:dim], stride, *a.strides[dim + 1 :]))


def dense_span(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Elements of the gapless interval that the strides cover once, or None where they leave gaps or overlap."""
    expected = 1
    for stride, extent in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n != 1):
        if stride != expected:
            return None
        expected *= extent
    return expected


def _place(shape: tuple[int, ...], piece: _Piece) -> BoxRun | list[_Piece]:
    """The box of a piece, or the smaller pieces that it falls into."""
    steps = contiguous_strides(shape)
    start = tuple(piece.near // c % max(n, 1) for c, n in zip(steps, shape, strict=True))
    by_dim: list[list[tuple[int, Axis]]] = [[] for _ in shape]
    for axis in piece.axes:
        dim = next((d for d, c in enumerate(steps) if shape[d] > 1 and 0 < c <= axis.near), None)
        if dim is None or axis.near % steps[dim]:
            return _unrolled(piece, axis)
        step = axis.near // steps[dim]
        room = (shape[dim] - 1 - start[dim]) // step + 1
        if axis.extent > room:
            return _cut_at_edge(piece, axis, shape[dim], step, room)
        by_dim[dim].append((step, axis))
    extents, strides = [1] * len(shape), [0] * len(shape)
    for dim, held in enumerate(by_dim):
        held.sort(key=lambda e: (e[0], e[1]))
        if start[dim] + sum(step * (axis.extent - 1) for step, axis in held) >= shape[dim]:
            return _unrolled(piece, held[-1][1])
        for step, axis in held:
            if step == 1 and extents[dim] == 1:
                extents[dim], strides[dim] = axis.extent, axis.far
            elif step == extents[dim] > 1 and axis.far == strides[dim] * extents[dim]:
                extents[dim] *= axis.extent
            else:
                return _unrolled(piece, axis)
    return BoxRun(Box(start, tuple(extents)), piece.far, tuple(strides))


def _unrolled(piece: _Piece, axis: Axis) -> list[_Piece]:
    """One piece for each index of an axis."""
    rest = _without(piece, axis)
    return [_Piece(piece.near + i * axis.near, piece.far + i * axis.far, rest) for i in range(axis.extent)]


def _cut_at_edge(piece: _Piece, axis: Axis, extent: int, step: int, room: int) -> list[_Piece]:
    """Cut an axis that runs over the end of a dimension: up to the edge, whole turns, and the rest."""
    if extent % step:
        return _unrolled(piece, axis)
    turn = extent // step
    if room < turn:
        return _parted(piece, axis, room)
    if axis.extent % turn:
        return _parted(piece, axis, axis.extent - axis.extent % turn)
    outer = Axis(axis.extent // turn, axis.near * turn, axis.far * turn)
    inner = Axis(turn, axis.near, axis.far)
    axes = tuple(a for a in (*_without(piece, axis), outer, inner) if a.extent != 1)
    return [_Piece(piece.near, piece.far, axes)]


def _parted(piece: _Piece, axis: Axis, count: int) -> list[_Piece]:
    """The first ``count`` indices of an axis, and the others."""
    rest = _without(piece, axis)
    parts = []
    for first, extent in ((0, count), (count, axis.extent - count)):
        axes = rest if extent == 1 else (*rest, Axis(extent, axis.near, axis.far))
        parts.append(_Piece(piece.near + first * axis.near, piece.far + first * axis.far, axes))
    return parts


def _without(piece: _Piece, axis: Axis) -> tuple[Axis, ...]:
    position = piece.axes.index(axis)
    return piece.axes[:position] + piece.axes[position + 1 :]
