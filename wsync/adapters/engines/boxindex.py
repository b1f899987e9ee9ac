"""Boxes in order of time, found by where they lie: so that many rows that are moved one by one stay cheap to follow."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wsync.adapters.engines.strided import subtract
from wsync.spec.box import Box

FEW = 16
"""Boxes that are looked through one by one."""


class _Class(NamedTuple):
    """Boxes of about one length, sorted by where they start."""

    longest: int
    starts: list[int]
    numbers: list[int]


class BoxIndex:
    """A list of boxes of one number of dimensions that answers which of them meet another box.

    Many boxes are sorted along the dimension that tells most of them apart, in classes of length: a box that meets a
    query starts at most its class's longest length before it. Sorted again when the list has doubled.
    """

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self._num_sorted = 0
        self._dim = 0
        self._classes: list[_Class] = []

    def append(self, box: Box) -> None:
        """Add a box; its number is how many were there before."""
        self.boxes.append(box)

    def meeting(self, box: Box, before: int | None = None) -> list[int]:
        """The numbers of the boxes that have elements in common with ``box``, the latest first.

        Args:
            before: only the first so many boxes count; None is all.
        """
        before = len(self.boxes) if before is None else before
        return sorted((i for i in self._near(box, before) if meet(self.boxes[i], box)), reverse=True)

    def _near(self, box: Box, before: int) -> Iterator[int]:
        if before <= FEW or not box.shape:
            yield from range(before)
            return
        if len(self.boxes) - self._num_sorted > max(FEW, self._num_sorted):
            self._sort()
        low, high = box.offset[self._dim], box.end[self._dim]
        for longest, starts, numbers in self._classes:
            first, last = bisect.bisect_right(starts, low - longest), bisect.bisect_left(starts, high)
            yield from (n for n in numbers[first:last] if n < before)
        yield from range(self._num_sorted, before)

    def _sort(self) -> None:
        boxes = self.boxes
        self._dim = max(range(len(boxes[0].shape)), key=lambda d: len({b.offset[d] for b in boxes}))
        by_length: dict[int, list[int]] = {}
        for number, box in enumerate(boxes):
            by_length.setdefault(box.shape[self._dim].bit_length(), []).append(number)
        self._classes = []
        for bits, numbers in by_length.items():
            numbers.sort(key=lambda n: boxes[n].offset[self._dim])
            self._classes.append(_Class(1 << bits, [boxes[n].offset[self._dim] for n in numbers], numbers))
        self._num_sorted = len(boxes)

    def latest(self, box: Box, before: int) -> Iterator[tuple[Box, int | None]]:
        """Cut ``box`` into parts that do not overlap, each with the number of the latest box over it, or None."""
        todo = [(box, self.meeting(box, before))]
        while todo:
            part, numbers = todo.pop()
            numbers = self._not_hidden(part, numbers)
            cut = self._cut(part, numbers) if len(numbers) > FEW else None
            if cut is None:
                yield from self._one_by_one(part, numbers)
                continue
            # Halves keep the work for N rows at N log N; cut where a row starts, so that few are cut themselves.
            for half in _halves(part, *cut):
                todo.append((half, [n for n in numbers if meet(self.boxes[n], half)]))

    def _not_hidden(self, part: Box, numbers: Sequence[int]) -> list[int]:
        """Those up to the latest that covers all of ``part``."""
        found: list[int] = []
        for n in numbers:
            found.append(n)
            if covers(self.boxes[n], part):
                break
        return found

    def _cut(self, part: Box, numbers: Sequence[int]) -> tuple[int, int] | None:
        """The dimension and place in the middle of where the boxes start, or None where all start as one."""
        best: list[int] = []
        dim = 0
        for d, (low, high) in enumerate(zip(part.offset, part.end, strict=True)):
            starts = sorted({s for n in numbers if low < (s := self.boxes[n].offset[d]) < high})
            if len(starts) > len(best):
                best, dim = starts, d
        return (dim, best[len(best) // 2]) if best else None

    def _one_by_one(self, part: Box, numbers: Sequence[int]) -> Iterator[tuple[Box, int | None]]:
        remaining = [part]
        for n in numbers:
            left: list[Box] = []
            for box in remaining:
                if covers(self.boxes[n], box):
                    yield box, n
                elif (common := box.intersect(self.boxes[n]) if meet(box, self.boxes[n]) else None) is None:
                    left.append(box)
                else:
                    left.extend(subtract(box, common))
                    yield common, n
            remaining = left
        for box in remaining:
            yield box, None


def meet(a: Box, b: Box) -> bool:
    """Whether two boxes have an element in common."""
    return all(
        p < q + n and q < p + m and m and n for p, m, q, n in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )


def covers(a: Box, b: Box) -> bool:
    """Whether every element of ``b`` is in ``a``."""
    return all(p <= q and q + n <= p + m for p, m, q, n in zip(a.offset, a.shape, b.offset, b.shape, strict=True))


def _halves(box: Box, dim: int, at: int) -> tuple[Box, Box]:
    low, high = box.offset[dim], box.end[dim]
    first = Box(box.offset, (*box.shape[:dim], at - low, *box.shape[dim + 1 :]))
    offset = (*box.offset[:dim], at, *box.offset[dim + 1 :])
    return first, Box(offset, (*box.shape[:dim], high - at, *box.shape[dim + 1 :]))
