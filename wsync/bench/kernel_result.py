"""The record of ``make record-kernels``, and the table that documents make of it."""

from __future__ import annotations

from typing import Any

import msgspec


class KernelRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operation on one core, or on all.

    Attributes:
        operation, case: what was measured.
        cores: ``"one"`` or ``"all"``.
        gbps: of the fastest round, in the record's unit.
        memcpy_gbps: libc's, with as many threads, right before or after (the faster).
        ratio_to_memcpy: of the two.
        correct: whether the results were checked and right.
        bar: the ratio that one core should reach, or None.
    """

    operation: str
    case: str
    cores: str
    gbps: float
    memcpy_gbps: float
    ratio_to_memcpy: float
    correct: bool
    bar: float | None = None


class KernelResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record: what ran where, and its rows. ``verdict`` is ``"ok"`` where every row was right."""

    format_version: int
    command: str
    started_utc: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    isa: str
    unit: str
    verdict: str
    rows: tuple[KernelRow, ...]


def kernel_table_of(result: KernelResult) -> str:
    """One row for each operation, one core beside all cores, in Markdown."""
    lines = ["| operation | one core | of memcpy | bar | all cores | of memcpy |", "|---|---:|---:|---:|---:|---:|"]
    every = {(row.operation, row.case, row.cores): row for row in result.rows}
    for row in result.rows:
        other = every.get((row.operation, row.case, "all"))
        if row.cores != "one" or other is None:
            continue
        name = f"{row.operation.replace('_', ' ')} {f'`{row.case}`' if row.case else ''}".strip()
        bar = "" if row.bar is None else f"{row.bar:.2f}"
        lines.append(
            f"| {name} | {row.gbps:.1f} GB/s | **{row.ratio_to_memcpy:.2f}** | {bar} | {other.gbps:.1f} GB/s | "
            f"{other.ratio_to_memcpy:.2f} |"
        )
    verdict = "every result checked" if result.verdict == "ok" else "A RESULT IS WRONG"
    lines += [
        "",
        f"{result.unit}; {result.isa}, {result.machine['cpu']}, {result.machine['num_cores']} cores; {verdict}. "
        "`make record-kernels`, record `bench/records/kernels_cpu.json`.",
    ]
    return "\n".join(lines)
