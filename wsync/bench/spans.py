"""Phases of a repeat with their begin and end on the machine's monotonic clock, which all its processes share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

ASSEMBLE = "assemble"
WIRE = "wire"
INSTALL = "install"
OTHER = "other"
PHASES = (ASSEMBLE, WIRE, INSTALL)
"""The phases that have a column. What a span does in detail is its name; the phase that it counts for is its phase."""

_PRIORITY = (ASSEMBLE, INSTALL, WIRE)


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One piece of work of one process.

    Attributes:
        name: what it did, such as ``gather`` or ``write``.
        phase: one of `PHASES`, or empty for what has no column.
        begin_s, end_s: on `time.monotonic`.
    """

    name: str
    phase: str
    begin_s: float
    end_s: float


class Recorder:
    """Collects the spans of one repeat on one rank. Used from one thread."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def span(self, name: str, phase: str = "") -> Iterator[None]:
        """Record the time that the body takes, also if it raises."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(Span(name, phase, begin, time.monotonic()))

    def add(self, name: str, phase: str, begin_s: float, end_s: float) -> None:
        """Record a span that was measured elsewhere."""
        self.spans.append(Span(name, phase, begin_s, end_s))


def attribute(spans: Iterable[Span], begin_s: float, end_s: float) -> dict[str, float]:
    """Split the time from ``begin_s`` to ``end_s`` among the phases, each moment once.

    ``spans`` are those of all ranks. A moment in which any rank assembles counts for assemble; else one in which any
    rank installs counts for install; else one in which anything travels counts for wire; what is left is ``other``.
    So the phases sum to the whole, and work that is hidden behind an earlier phase costs nothing.
    """
    edges = {begin_s, end_s}
    steps: list[tuple[float, str, int]] = []
    for span in spans:
        first, last = max(span.begin_s, begin_s), min(span.end_s, end_s)
        if span.phase in _PRIORITY and first < last:
            steps += [(first, span.phase, 1), (last, span.phase, -1)]
            edges |= {first, last}
    steps.sort(key=lambda step: step[0])
    seconds = dict.fromkeys((*PHASES, OTHER), 0.0)
    active = dict.fromkeys(_PRIORITY, 0)
    times, pos = sorted(edges), 0
    for time_s, next_s in itertools.pairwise(times):
        while pos < len(steps) and steps[pos][0] <= time_s:
            active[steps[pos][1]] += steps[pos][2]
            pos += 1
        seconds[next((phase for phase in _PRIORITY if active[phase]), OTHER)] += next_s - time_s
    return seconds
