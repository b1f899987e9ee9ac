"""What a publish achieved of what was predicted, link by link and phase by phase: where it is lost.

A publish's report has seconds by rank and phase on each host's own clock, so that only durations are compared, never
times of two hosts. Bytes of a link are the plan's; the seconds are those of the rank that the link belongs to, else
those of the slowest rank that sends or receives.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from wsync.errors import ConfigError, FormatVersionError
from wsync.plan.timing import LinkLoad
from wsync.topo.placement_plan import read_plan
from wsync.topo.placement_rates import SOFTWARE_SHARE

ACHIEVED_VERSION = 1
"""Version of ``wsync topo achieved --json``."""
GOOD_SHARE = 0.9
SLOW_RANK = 1.25
FASTER_SHARE = 1.25
PLAN_VERSION = 1

SENDING = ("pack", "flush")
RECEIVING = "receive"
AFTER = ("repack", "decide", "install", "finish")
_TRAINER = re.compile(r"trainer rank (\d+)")
_SINK = re.compile(r"sink (\d+)")

WHY = {
    "amax": "scales of cut blocks are exchanged before anything is packed: fewer blocks across shards, or bf16",
    "pack": "reading and quantising weights on the trainer: see the kernels and the memory rate",
    "flush": "the last buckets leave late: larger buckets, or more senders",
    "receive": "the wire, or the senders that feed it",
    "verify": "digests of what was staged, on the engine's host",
    "repack": "the engine's own code packs weights; outside of wsync",
    "decide": "waiting for the slowest replica's vote",
    "install": "writing live memory while the engine stands still",
    "finish": "packed forms and derived state",
}


class Run(msgspec.Struct, frozen=True):
    """One publish, from whichever report.

    Attributes:
        name: of the report or of a row of it.
        wire_bytes: that trainer ranks sent.
        total_s: publish called to last replica committed.
        ranks: name -> phase -> seconds, in the report's order (trainer ranks are ``trainer/N``).
    """

    name: str
    wire_bytes: int
    total_s: float
    ranks: dict[str, dict[str, float]]

    def slowest(self, phase: str) -> tuple[float, str]:
        """Seconds and name of the rank that took longest; 0.0 and "" where no rank has the phase."""
        found = [(phases[phase], name) for name, phases in self.ranks.items() if phase in phases]
        return max(found, default=(0.0, ""))

    @property
    def wire_s(self) -> float:
        """Seconds of the slowest rank that receives, or packs and sends."""
        sending = [sum(p.get(x, 0.0) for x in SENDING) for p in self.ranks.values()]
        return max(self.slowest(RECEIVING)[0], *sending, 0.0) or self.total_s


class Link(msgspec.Struct, frozen=True):
    """One part of the cluster: predicted and achieved GB/s."""

    name: str
    nbytes: int
    predicted_gbps: float
    achieved_gbps: float

    @property
    def share(self) -> float:
        """Achieved of predicted."""
        return self.achieved_gbps / self.predicted_gbps if self.predicted_gbps else 1.0


class Phase(msgspec.Struct, frozen=True):
    """Seconds of the slowest rank of a phase, and of the usual one."""

    name: str
    seconds: float
    rank: str
    usual_s: float


class Achieved(msgspec.Struct, frozen=True):
    """One publish against its prediction.

    Attributes:
        name: of the report or row.
        verdict: OK from 90 % of the predicted rate on the wire, else WARN.
        predicted_s, wire_s, total_s: of the plan; of the wire, measured; of the whole publish.
        predicted_gbps, wire_gbps: all bytes over these.
        bound: ``"software"`` where the wire takes less than half of the predicted rate, else ``"links"``.
        links: the busiest first.
        phases: the longest first.
        losses: in words, the largest first.
    """

    name: str
    verdict: Literal["OK", "WARN"]
    predicted_s: float
    wire_s: float
    total_s: float
    predicted_gbps: float
    wire_gbps: float
    bound: Literal["links", "software"]
    links: tuple[Link, ...]
    phases: tuple[Phase, ...]
    losses: tuple[str, ...]
    format_version: int = ACHIEVED_VERSION


class Prediction(msgspec.Struct, frozen=True):
    """What ``wsync topo plan --json`` says, as far as it is compared."""

    time_s: float
    wire_bytes: int
    links: tuple[LinkLoad, ...]


def compare_run(run: Run, prediction: Prediction) -> Achieved:
    """Compare a publish with its prediction.

    A publish of other bytes than the plan (a delta, another recipe) is compared by the byte.
    """
    if run.wire_bytes <= 0 or prediction.wire_bytes <= 0:
        raise ConfigError(
            f"{run.name} moved {run.wire_bytes} bytes, the plan {prediction.wire_bytes}: nothing to compare"
        )
    scale = run.wire_bytes / prediction.wire_bytes
    predicted_s = prediction.time_s * scale
    wire_s = run.wire_s
    predicted_gbps, wire_gbps = (run.wire_bytes / 1e9 / max(s, 1e-12) for s in (predicted_s, wire_s))
    phases = tuple(sorted(_phases(run), key=lambda p: -p.seconds))
    links = tuple(_links(run, prediction, scale))
    share = wire_gbps / predicted_gbps
    software = share < SOFTWARE_SHARE
    return Achieved(
        run.name,
        "OK" if share >= GOOD_SHARE else "WARN",
        predicted_s,
        wire_s,
        run.total_s,
        predicted_gbps,
        wire_gbps,
        "software" if software else "links",
        links,
        phases,
        tuple(_losses(run, predicted_s, share, phases, scale)),
    )


def _links(run: Run, prediction: Prediction, scale: float) -> Iterator[Link]:
    trainers = [name for name in run.ranks if name.startswith("trainer/")]
    sinks = [name for name in run.ranks if not name.startswith("trainer/")]
    for load in prediction.links:
        window = _window(run, load.name, trainers, sinks)
        nbytes = round(load.nbytes * scale)
        predicted = load.nbytes / 1e9 / load.seconds if load.seconds else 0.0
        yield Link(load.name, nbytes, round(predicted, 3), round(nbytes / 1e9 / max(window, 1e-12), 3))


def _window(run: Run, name: str, trainers: Sequence[str], sinks: Sequence[str]) -> float:
    """Seconds of the rank that a link belongs to."""
    for pattern, ranks, phases in ((_TRAINER, trainers, SENDING), (_SINK, sinks, (RECEIVING,))):
        found = pattern.search(name)
        if found and int(found[1]) < len(ranks):
            own = sum(run.ranks[ranks[int(found[1])]].get(p, 0.0) for p in phases)
            if own:
                return own
    return run.wire_s


def _phases(run: Run) -> Iterator[Phase]:
    for name in dict.fromkeys(p for phases in run.ranks.values() for p in phases if p in WHY):
        seconds, rank = run.slowest(name)
        usual = statistics.median(phases[name] for phases in run.ranks.values() if name in phases)
        yield Phase(name, seconds, rank, usual)


def _losses(run: Run, predicted_s: float, share: float, phases: Sequence[Phase], scale: float) -> Iterator[str]:
    if abs(scale - 1) > 0.01:
        yield (f"the publish moved {scale:.3g} times the plan's bytes (a delta, another recipe?): prediction scaled")
    if share < SOFTWARE_SHARE:
        slow = next((p for p in phases if p.name in ("pack", "verify", "amax", "flush")), None)
        reason = f"; the longest of its phases is {slow.name} ({slow.seconds:.3g} s): {WHY[slow.name]}" if slow else ""
        yield f"software bound: the wire takes {share:.0%} of what its links should carry{reason}"
    elif share < GOOD_SHARE:
        yield f"the wire takes {share:.0%} of what its links should carry: measure them (`wsync topo import-bandwidth`)"
    elif share > FASTER_SHARE:
        yield f"the wire takes {share:.0%} of what its links carry: it did not go over them, or their rates are too low"
    late = run.total_s - run.wire_s
    if late > 0.1 * run.total_s:
        after = ", ".join(
            f"{p.name} {p.seconds:.3g} s" for p in phases if p.name in AFTER and p.seconds > 0.02 * run.total_s
        )
        outside = f"{late:.3g} of {run.total_s:.3g} s pass outside of the wire"
        yield f"{outside} ({predicted_s:.3g} s predicted): {after or 'waiting'}"
    for phase in phases:
        if phase.seconds > SLOW_RANK * phase.usual_s and phase.seconds > 0.05 * run.total_s:
            yield f"{phase.rank} takes {phase.seconds:.3g} s to {phase.name}, the usual rank {phase.usual_s:.3g} s"


# Readers


def decode_runs(data: bytes, name: str) -> tuple[Run, ...]:
    """Publishes of a report: a `PublishReport` as JSON, or the record of ``wsync bench e2e --json``.

    Raises:
        ConfigError: not JSON, neither of the two, or damaged.
    """
    value = _json(data, name)
    try:
        if isinstance(value.get("rows"), list):
            return tuple(_bench_runs(msgspec.convert(value, _Bench)))
        report = msgspec.convert(value, _Report)
    except (msgspec.ValidationError, RecursionError) as e:
        raise ConfigError(f"{name} is no report of a publish and no record of `wsync bench e2e`: {e}") from e
    ranks = {rank: _spent((phase, end - begin) for phase, begin, end in stamps) for rank, stamps in report.ranks}
    total = report.seconds.get("total", 0.0)
    if not total > 0:
        raise ConfigError(f"{name}: a publish of {total} seconds")
    return (Run(name, report.wire_bytes, total, ranks),)


def decode_prediction(data: bytes, name: str) -> Prediction:
    """What ``wsync topo plan --json`` wrote, or an encoded plan.

    Without layouts the senders are the only link; of an encoded plan, which knows no rates, everything together is.

    Raises:
        FormatVersionError: of another version.
        ConfigError: truncated, or something else.
    """
    if data.lstrip()[:1] != b"{":
        return _of_plan(data, name)
    value = _json(data, name)
    if value.get("format_version") != PLAN_VERSION:
        got = value.get("format_version")
        raise FormatVersionError(f"{name}: a prediction of version {got!r}, this wsync reads {PLAN_VERSION}")
    try:
        found = msgspec.convert(value, _TopoPlan)
    except (msgspec.ValidationError, RecursionError) as e:
        raise ConfigError(f"{name} is not what `wsync topo plan --json` writes: {e}") from e
    if found.plan is not None:
        return found.plan
    now = found.placement.now
    return Prediction(now.time_s, found.nbytes, (LinkLoad(now.slowest, found.nbytes, now.time_s),))


def _of_plan(data: bytes, name: str) -> Prediction:
    try:
        plan = read_plan(data, name)
    except ConfigError as e:
        raise ConfigError(
            f"{name} is neither what `wsync topo plan --json` writes nor an encoded plan",
            hint="`wsync topo plan --json FILE` writes one with rates link by link, `wsync plan -o FILE` the other",
        ) from e
    nbytes = plan.wire_bytes
    return Prediction(plan.time_s, nbytes, (LinkLoad(f"all of it ({plan.binding_cut})", nbytes, plan.time_s),))


class _Report(msgspec.Struct, frozen=True):
    wire_bytes: int
    seconds: dict[str, float]
    ranks: tuple[tuple[str, tuple[tuple[str, float, float], ...]], ...]


class _BenchRank(msgspec.Struct, frozen=True):
    name: str
    phases: dict[str, tuple[float, float, float]]


class _BenchRepeat(msgspec.Struct, frozen=True):
    seconds: float
    ranks: tuple[_BenchRank, ...]


class _BenchRow(msgspec.Struct, frozen=True):
    recipe: str
    row: str
    wire_bytes: int
    repeats: tuple[_BenchRepeat, ...]


class _Bench(msgspec.Struct, frozen=True):
    rows: tuple[_BenchRow, ...]


class _Step(msgspec.Struct, frozen=True):
    time_s: float
    slowest: str


class _Placement(msgspec.Struct, frozen=True):
    now: _Step


class _TopoPlan(msgspec.Struct, frozen=True):
    nbytes: int
    placement: _Placement
    plan: Prediction | None


def _bench_runs(bench: _Bench) -> Iterator[Run]:
    """The median repeat of each row that wsync itself ran."""
    for row in bench.rows:
        if row.row != "wsync" or not row.repeats:
            continue
        repeat = sorted(row.repeats, key=lambda r: r.seconds)[len(row.repeats) // 2]
        ranks = {r.name: {p: times[0] for p, times in r.phases.items() if p in WHY} for r in repeat.ranks}
        yield Run(row.recipe, row.wire_bytes, repeat.seconds, ranks)


def _spent(stamps: Iterator[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for phase, seconds in stamps:
        found[phase] = found.get(phase, 0.0) + seconds
    return found


def _json(data: bytes, name: str) -> Mapping[str, object]:
    try:
        value = msgspec.json.decode(data)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{name}: not JSON, or truncated: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: JSON of a {type(value).__name__}, a report is an object")
    return value
