"""The record of ``python -m wsync.bench.planning``, and the table that documents make of it."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_PEAK_BYTES = 2 << 30
MAX_SLICE_BYTES = 8_000_000
MAX_REPLAN_SHARE = 0.1


class PlanningRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One job, planned on one core.

    Attributes:
        case: name of the job.
        model, source_layout, sink_layout, recipe: of the job.
        num_tensors, num_sources, num_sinks: how large it is.
        score: predicted seconds over the lower bound.
        plan_s: seconds from two manifests to a plan, the median of several.
        plan_bar_s: what they should be at most.
        replan_s: seconds to a plan without one replica, likewise.
        replan_score: of that plan.
        peak_bytes: resident memory of a process that only describes and plans, manifests included.
        source_slice_bytes: of the largest slice of a trainer rank, as it travels.
        sink_slice_bytes: of the largest slice of the first replica, likewise.
        num_pieces: that the sink with the largest slice takes.
        expand_s: seconds in which it expands its slice.
    """

    case: str
    model: str
    source_layout: str
    sink_layout: str
    recipe: str
    num_tensors: int
    num_sources: int
    num_sinks: int
    score: float
    plan_s: float
    plan_bar_s: float
    replan_s: float
    replan_score: float
    peak_bytes: int
    source_slice_bytes: int
    sink_slice_bytes: int
    num_pieces: int
    expand_s: float

    @property
    def is_good(self) -> bool:
        """Whether the job is planned within its bars."""
        return (
            self.plan_s <= self.plan_bar_s
            and self.replan_s <= MAX_REPLAN_SHARE * self.plan_s
            and self.peak_bytes <= MAX_PEAK_BYTES
            and max(self.source_slice_bytes, self.sink_slice_bytes) <= MAX_SLICE_BYTES
        )


class PlanningResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record: what ran where, and its rows. ``verdict`` is ``"ok"`` where every row is within its bars."""

    format_version: int
    command: str
    started_utc: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    verdict: str
    planning: tuple[PlanningRow, ...]


def planning_table_of(result: PlanningResult) -> str:
    """One row for each job, in Markdown."""
    lines = [
        "| job | plan | bar | one replica lost | of the plan | peak memory | largest slice | score |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result.planning:
        slice_mb = max(row.source_slice_bytes, row.sink_slice_bytes) / 1e6
        lines.append(
            f"| {row.case} | **{row.plan_s:.2f} s** | {row.plan_bar_s:.0f} s | {1000 * row.replan_s:.0f} ms | "
            f"{100 * row.replan_s / row.plan_s:.1f} % | {row.peak_bytes / 2**20:.0f} MiB | {slice_mb:.1f} MB | "
            f"{row.score:.3f} |"
        )
    largest = max(result.planning, key=lambda row: row.num_pieces)
    lines += [
        "",
        f"One core of {result.machine['cpu']}, Python {result.versions['python']}. The sink with the largest slice of "
        f"{largest.case} expands it to {largest.num_pieces / 1e6:.1f} million pieces in {largest.expand_s:.1f} s. "
        f"`{result.command}`, record `bench/records/planning.json`.",
    ]
    return "\n".join(lines)
