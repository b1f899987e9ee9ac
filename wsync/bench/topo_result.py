"""The record of ``python bench/record_topo.py``, and the table that documents make of it."""

from __future__ import annotations

from typing import Any

import msgspec


class TopoRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One check inside the process, from texts to the verdict.

    Attributes:
        case: what is read.
        num_machines: of eight GPUs each.
        check_s: processor seconds, the median of several.
        bar_s: what they should be at most.
        correct: whether the verdicts were right.
    """

    case: str
    num_machines: int
    check_s: float
    bar_s: float
    correct: bool


class TopoResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record: what ran where, and its rows. ``verdict`` is ``"ok"`` where every row is right and within its bar."""

    format_version: int
    command: str
    started_utc: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    verdict: str
    topo: tuple[TopoRow, ...]


def topo_table_of(result: TopoResult) -> str:
    """One row for each check, in Markdown."""
    lines = ["| checked from | machines | seconds | bar |", "|---|---:|---:|---:|"]
    for row in result.topo:
        lines.append(f"| {row.case} | {row.num_machines} | **{_spell(row.check_s)}** | {_spell(row.bar_s)} |")
    lines += [
        "",
        f"One core of {result.machine['cpu']}, Python {result.versions['python']}. `{result.command}`, record "
        "`bench/records/topo.json`.",
    ]
    return "\n".join(lines)


def _spell(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{seconds:.1f} s"
