"""The record of ``python -m wsync.bench.shootout``, and the tables that documents make of it."""

from __future__ import annotations

from typing import Any

import msgspec

WSYNC = "wsync"
"""The name of this project's row."""

TOLERANCE = 1e-3
"""Relative difference of two times that counts as equal: the time model is less exact than that."""


class PolicyRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way of routing one preset.

    Attributes:
        policy: its name.
        time_s: that the time model predicts.
        score: over the lower bound.
        delivered_ratio: bytes that arrive at engine ranks over bytes that these need.
        entering_ratio: bytes that enter NVLink domains of engines over bytes that these need and do not hold.
        plan_s: seconds that the routing alone took.
    """

    policy: str
    time_s: float
    score: float
    delivered_ratio: float
    entering_ratio: float
    plan_s: float


class PresetResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One preset.

    Attributes:
        preset: its name.
        num_sources, num_sinks: ranks.
        lower_bound_s: of the preset.
        binding_cut: that gives it.
        plan_s: seconds that the whole of wsync's planning took, from manifests to plan.
        rows: wsync's first, then every policy.
    """

    preset: str
    num_sources: int
    num_sinks: int
    lower_bound_s: float
    binding_cut: str
    plan_s: float
    rows: tuple[PolicyRow, ...]

    def row(self, policy: str) -> PolicyRow:
        """The row of that name."""
        return next(r for r in self.rows if r.policy == policy)

    @property
    def beaten_by(self) -> tuple[str, ...]:
        """Policies that are faster than wsync's plan."""
        limit = self.row(WSYNC).time_s * (1 - TOLERANCE)
        return tuple(r.policy for r in self.rows if r.time_s < limit)


class PeerRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One planner on the small case.

    Attributes:
        planner: its name.
        version: of its package; None where it is not installed, with the modules that are missing.
        missing: those.
        time_s, score, delivered_ratio, entering_ratio: as in `PolicyRow`; None where it did not run.
        plan_s: of its planner, without describing the case to it.
        num_operations: copies that it lists; for wsync buckets.
    """

    planner: str
    version: str | None
    missing: tuple[str, ...] = ()
    time_s: float | None = None
    score: float | None = None
    delivered_ratio: float | None = None
    entering_ratio: float | None = None
    plan_s: float | None = None
    num_operations: int | None = None


class ShootoutResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole run.

    Attributes:
        presets: every preset without failures.
        peer_case: what the peers' own planners were given.
        peers: wsync's row first.
        machine, versions: what it ran on.
        verdict: ``"ok"`` where no policy and no planner is faster than wsync's plan.
    """

    presets: tuple[PresetResult, ...]
    peer_case: str
    peers: tuple[PeerRow, ...]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    verdict: str


def shootout_table_of(result: ShootoutResult) -> str:
    """Time over the lower bound, a row for each preset and a column for each policy; then the planners. Markdown."""
    policies = [r.policy for r in result.presets[0].rows]
    lines = [
        "| time over lower bound | "
        + " | ".join(f"**{p}**" if p == WSYNC else p for p in policies)
        + " | wsync beaten by |",
        "|---|" + "---:|" * len(policies) + "---|",
    ]
    for preset in result.presets:
        cells = [_score(preset.row(p)) for p in policies]
        lines.append(f"| {preset.preset} | " + " | ".join(cells) + f" | {', '.join(preset.beaten_by) or 'never'} |")
    lines += [_mean_line(result, policies), "", *_peer_lines(result), ""]
    verdict = "no policy and no planner is faster than wsync's plan" if result.verdict == "ok" else "WSYNC IS BEATEN"
    lines.append(
        f"Predicted by wsync's time model for all alike, equal within 0.1 %; {verdict}. Planned on one core of "
        f"{result.machine['cpu']}. "
        "`make record-shootout`, record `bench/records/shootout.json`."
    )
    return "\n".join(lines)


def _score(row: PolicyRow) -> str:
    text = f"{row.score:.3f}" if row.score < 2 else f"{row.score:.2f}" if row.score < 10 else f"{row.score:.0f}"
    return f"**{text}**" if row.policy == WSYNC else text


def _mean_line(result: ShootoutResult, policies: list[str]) -> str:
    """Bytes that enter domains over need, the mean over presets."""
    cells = []
    for policy in policies:
        ratios = [p.row(policy).entering_ratio for p in result.presets]
        cells.append(f"{sum(ratios) / len(ratios):.2f}")
    return "| bytes into domains over need, mean | " + " | ".join(cells) + " | |"


def _peer_lines(result: ShootoutResult) -> list[str]:
    lines = [
        f"| planner, {result.peer_case} | time over lower bound | bytes into domains over need | plans in |",
        "|---|---:|---:|---:|",
    ]
    for row in result.peers:
        name = f"**{row.planner}**" if row.planner == WSYNC else f"{row.planner} {row.version or ''}".strip()
        if row.score is None or row.entering_ratio is None or row.plan_s is None:
            lines.append(f"| {name} | not installed: {', '.join(row.missing)} | | |")
        else:
            lines.append(f"| {name} | {row.score:.2f} | {row.entering_ratio:.2f} | {1000 * row.plan_s:.0f} ms |")
    return lines
