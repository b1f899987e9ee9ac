"""Index lists to runs: which elements of an index are rows of equal length at equal distances. Pure NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Offsets = np.ndarray[Any, np.dtype[np.int64]]


class Run(NamedTuple):
    """Rows of one copy, by the element that each side starts with.

    Attributes:
        first: of the side that is written.
        other: of the other side.
        rows: how many.
        step, other_step: elements from row to row; ``step`` is positive and ``other_step`` not negative.
        length: elements of a row, in the units of either side.
    """

    first: int
    other: int
    rows: int
    step: int
    other_step: int
    length: int


def runs_of(first: Offsets, other: Offsets, unit: int, other_unit: int, limit: int | None = None) -> list[Run] | None:
    """Say pairs of places as runs, in their order.

    Neighbours that are one unit apart on both sides are a row; rows of equal length and distance are a run.

    Args:
        first, other: element offsets `[N]` of both sides.
        unit, other_unit: distance of neighbours, in elements.
        limit: rows that are allowed; None is any number.

    Returns:
        The runs, or None where there are more than ``limit`` rows.
    """
    if not len(first):
        return []
    breaks = np.flatnonzero((np.diff(first) != unit) | (np.diff(other) != other_unit)) + 1
    starts = np.concatenate(([0], breaks))
    if limit is not None and len(starts) > limit:
        return None
    lengths = np.diff(np.concatenate((starts, [len(first)])))
    first, other = first[starts], other[starts]
    steps, other_steps = np.diff(first), np.diff(other)
    alike = (lengths[1:] == lengths[:-1]) & (steps > 0) & (other_steps >= 0)
    # Distances that are not those before them: a run ends there.
    changes = np.flatnonzero((np.diff(steps) != 0) | (np.diff(other_steps) != 0) | ~alike[1:]) + 1
    found: list[Run] = []
    row = 0
    while row < len(starts):
        last = row
        if row < len(alike) and alike[row]:
            end = int(np.searchsorted(changes, row, "right"))
            last = int(changes[end]) if end < len(changes) else len(starts) - 1
        step, other_step = (int(steps[row]), int(other_steps[row])) if last > row else (0, 0)
        found.append(Run(int(first[row]), int(other[row]), last - row + 1, step, other_step, int(lengths[row])))
        row = last + 1
    return found
