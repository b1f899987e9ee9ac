"""From what the ranks said to the rows of the table."""

from __future__ import annotations

from typing import Any

import msgspec

from wsync.bench.events import WARM_UP, Event, Memory, Recipe, Repeated, Started, Verified
from wsync.bench.figures import Spread, spread_of
from wsync.bench.limit import MemcpyRate, limit_seconds
from wsync.bench.options import TITLES, WSYNC, BenchOptions
from wsync.bench.spans import OTHER, PHASES, Span, attribute

FORMAT_VERSION = 1
"""Of the JSON that ``wsync bench e2e --json`` writes."""


class RankRecord(msgspec.Struct, frozen=True):
    """One rank in one repeat; seconds count from the publish.

    Attributes:
        name: ``trainer/0``, ``engine/1``.
        begin_s, end_s: of its part.
        phases: name of a span -> its busy seconds, first begin and last end.
    """

    name: str
    begin_s: float
    end_s: float
    phases: dict[str, tuple[float, float, float]]


class RepeatRecord(msgspec.Struct, frozen=True):
    """One repeat, as measured."""

    repeat: int
    version: int
    seconds: float
    stall_s: float
    pause_s: float
    phases_s: dict[str, float]
    verified: bool
    ranks: list[RankRecord]


class RowResult(msgspec.Struct, frozen=True):
    """One row of the table. ``docs/measurement.md`` defines every field."""

    recipe: str
    row: str
    title: str
    seconds: Spread
    stall_s: Spread
    pause_s: Spread
    assemble_s: Spread
    wire_s: Spread
    install_s: Spread
    other_s: Spread
    logical_bytes: int
    wire_bytes: int
    logical_gbps: float
    wire_gbps: float
    trainer_extra_bytes: int
    engine_extra_bytes: int
    first_s: float
    limit_s: float
    limit_share: float
    ratio: float
    """Seconds of this row over seconds of wsync for the same recipe (p50)."""
    verdict: str
    repeats: list[RepeatRecord]


class Result(msgspec.Struct, frozen=True):
    """A whole run: what ``--json`` writes."""

    format_version: int
    command: str
    argv: list[str]
    started_utc: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    options: BenchOptions
    conditions: dict[str, str]
    memcpy: MemcpyRate
    trainer_bytes: int
    engine_bytes: dict[str, int]
    rows: list[RowResult]
    verdict: str

    def row(self, recipe: str, row: str) -> RowResult:
        """The row of that name.

        Raises:
            KeyError: there is none.
        """
        for result in self.rows:
            if (result.recipe, result.row) == (recipe, row):
                return result
        raise KeyError(f"{recipe}, {row}")


class TimedSpan(msgspec.Struct, frozen=True):
    """A span with where it belongs, for the trace."""

    recipe: str
    row: str
    repeat: int
    rank: int
    span: Span


class Collector:
    """Takes events in any order and makes rows of them."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._repeats: dict[tuple[str, str, int], dict[int, Repeated]] = {}
        self._verdicts: dict[tuple[str, str, int], dict[int, Verified]] = {}
        self._memory: dict[tuple[str, str], dict[int, Memory]] = {}
        self.trainer_bytes = 0
        self.engine_bytes: dict[str, int] = dict.fromkeys(options.recipes, 0)

    def add(self, rank: int, event: Event) -> None:
        """Take one event of one rank."""
        if isinstance(event, Started):
            self.trainer_bytes += event.num_bytes
        elif isinstance(event, Recipe):
            self.engine_bytes[event.recipe] += event.num_bytes
        elif isinstance(event, Repeated):
            self._repeats.setdefault((event.step.recipe, event.step.row, event.step.repeat), {})[rank] = event
        elif isinstance(event, Verified):
            self._verdicts.setdefault((event.step.recipe, event.step.row, event.step.repeat), {})[rank] = event
        elif isinstance(event, Memory):
            self._memory.setdefault((event.recipe, event.row), {})[rank] = event

    def rows(self, rate: MemcpyRate) -> list[RowResult]:
        """All rows, wsync first in each recipe."""
        results = []
        for recipe in self._options.recipes:
            limit_s = limit_seconds(self.trainer_bytes, self.engine_bytes[recipe], rate)
            base = self._row(recipe, WSYNC, limit_s, None)
            results.append(base)
            results += [self._row(recipe, row, limit_s, base.seconds.p50) for row in self._options.baselines]
        return results

    def spans(self) -> list[TimedSpan]:
        """Every span of every timed repeat."""
        found = []
        for (recipe, row, repeat), ranks in self._repeats.items():
            if repeat == WARM_UP:
                continue
            for rank, spans in self._spans_by_rank(ranks).items():
                found += [TimedSpan(recipe, row, repeat, rank, span) for span in spans]
        return found

    def _row(self, recipe: str, row: str, limit_s: float, wsync_s: float | None) -> RowResult:
        repeats = [self._repeat(recipe, row, repeat) for repeat in range(self._options.repeats)]
        seconds = spread_of([r.seconds for r in repeats])
        wire_bytes = sum(event.wire_bytes for event in self._repeats[recipe, row, 0].values())
        memory = self._memory.get((recipe, row), {})
        phases = {phase: spread_of([r.phases_s[phase] for r in repeats]) for phase in (*PHASES, OTHER)}
        return RowResult(
            recipe=recipe,
            row=row,
            title=TITLES[row],
            seconds=seconds,
            stall_s=spread_of([r.stall_s for r in repeats]),
            pause_s=spread_of([r.pause_s for r in repeats]),
            assemble_s=phases["assemble"],
            wire_s=phases["wire"],
            install_s=phases["install"],
            other_s=phases[OTHER],
            logical_bytes=self.trainer_bytes,
            wire_bytes=wire_bytes,
            logical_gbps=self.trainer_bytes / seconds.p50 / 1e9,
            wire_gbps=wire_bytes / seconds.p50 / 1e9,
            trainer_extra_bytes=sum(m.extra_bytes for rank, m in memory.items() if self._is_trainer(rank)),
            engine_extra_bytes=sum(m.extra_bytes for rank, m in memory.items() if not self._is_trainer(rank)),
            first_s=max((m.first_s for m in memory.values()), default=0.0),
            limit_s=limit_s,
            limit_share=limit_s / seconds.p50,
            ratio=seconds.p50 / wsync_s if wsync_s else 1.0,
            verdict=self._verdict(recipe, row),
            repeats=repeats,
        )

    def _repeat(self, recipe: str, row: str, repeat: int) -> RepeatRecord:
        ranks = self._repeats[recipe, row, repeat]
        trainers = [event for rank, event in ranks.items() if self._is_trainer(rank)]
        engines = [event for rank, event in ranks.items() if not self._is_trainer(rank)]
        begin = min(event.begin_s for event in trainers)
        end = max(event.end_s for event in engines)
        spans = self._spans_by_rank(ranks)
        return RepeatRecord(
            repeat=repeat,
            version=trainers[0].version,
            seconds=end - begin,
            stall_s=max(event.released_s for event in trainers) - begin,
            pause_s=max(event.pause_s for event in engines),
            phases_s=attribute([span for found in spans.values() for span in found], begin, end),
            verified=self._verdict_of(recipe, row, repeat) == "ok",
            ranks=[self._record(rank, ranks[rank], spans[rank], begin) for rank in sorted(ranks)],
        )

    def _spans_by_rank(self, ranks: dict[int, Repeated]) -> dict[int, list[Span]]:
        names = {self._name(rank): rank for rank in ranks}
        spans = {rank: list(event.spans) for rank, event in ranks.items()}
        for event in ranks.values():
            for name, remote in event.remote_spans.items():
                spans[names[name]].extend(remote)
        return spans

    def _record(self, rank: int, event: Repeated, spans: list[Span], begin: float) -> RankRecord:
        phases: dict[str, tuple[float, float, float]] = {}
        for span in spans:
            first, last = span.begin_s - begin, span.end_s - begin
            busy, low, high = phases.get(span.name, (0.0, first, last))
            phases[span.name] = (busy + last - first, min(low, first), max(high, last))
        rounded = {name: (round(a, 6), round(b, 6), round(c, 6)) for name, (a, b, c) in phases.items()}
        return RankRecord(self._name(rank), round(event.begin_s - begin, 6), round(event.end_s - begin, 6), rounded)

    def _verdict(self, recipe: str, row: str) -> str:
        verdicts = [self._verdict_of(recipe, row, repeat) for repeat in range(WARM_UP, self._options.repeats)]
        return next((verdict for verdict in verdicts if verdict != "ok"), "ok")

    def _verdict_of(self, recipe: str, row: str, repeat: int) -> str:
        verdicts = self._verdicts.get((recipe, row, repeat), {})
        if len(verdicts) != self._options.num_engines:
            return f"{len(verdicts)} of {self._options.num_engines} engines were verified"
        for rank, verdict in sorted(verdicts.items()):
            if verdict.difference:
                return f"{self._options.rank_name(rank)}, {verdict.step}: {verdict.difference}"
        return "ok"

    def _is_trainer(self, rank: int) -> bool:
        return rank < self._options.num_trainers

    def _name(self, rank: int) -> str:
        return self._options.rank_name(rank).replace(" ", "/")
