"""Figures over repeats, and how tables write them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """A value over the timed repeats."""

    p50: float
    min: float
    max: float


def spread_of(values: Sequence[float]) -> Spread:
    """Median, least and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def format_range(spread: Spread) -> str:
    """``12.3 - 45.6 ms``."""
    unit, factor = ("s", 1) if spread.max >= 1 else ("ms", 1e3)
    return f"{spread.min * factor:.3g} - {spread.max * factor:.3g} {unit}"


def format_seconds(value: float) -> str:
    """Three significant digits, in seconds or milliseconds."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e3:.2f} ms"


def format_size(num_bytes: float) -> str:
    """Three significant digits, in bytes or a multiple (1 GB = 1e9)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
