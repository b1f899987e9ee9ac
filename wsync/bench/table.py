"""The tables on stdout. ``docs/measurement.md`` defines every column."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wsync.bench.figures import format_range, format_seconds, format_size
from wsync.bench.options import WSYNC
from wsync.bench.result import Result, RowResult


def print_result(result: Result, console: Console) -> None:
    """Two tables (how long; where the time, bytes and memory go) and what they were measured on."""
    options = result.options
    console.print(
        f"[bold]wsync bench e2e[/bold]: {options.model_name}, {format_size(result.trainer_bytes)} in bf16, "
        f"{options.num_trainers} FSDP2 trainer processes -> {options.num_engines} tensor-parallel engine processes, "
        f"{options.repeats} repeats"
    )
    console.print(_times(result))
    console.print(_details(result))
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


def _times(result: Result) -> Table:
    table = Table(title="Publish to last replica committed", title_justify="left", box=SIMPLE_HEAD)
    for name in ("recipe", "row"):
        table.add_column(name, no_wrap=True)
    for name in ("p50", "min - max", "wsync faster", "of limit", "model GB/s", "wire GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in result.rows:
        is_wsync = row.row == WSYNC
        table.add_row(
            row.recipe if is_wsync else "",
            row.title,
            format_seconds(row.seconds.p50),
            format_range(row.seconds),
            "" if is_wsync else f"{row.ratio:.1f} x",
            f"{100 * row.limit_share:.1f} %",
            f"{row.logical_gbps:.2f}",
            f"{row.wire_gbps:.2f}",
            verdict_text(row.verdict),
            style="bold" if is_wsync else "",
        )
        if _is_last(result, row):
            table.add_row("", "limit", format_seconds(row.limit_s), "", "", "100.0 %", "", "", "", style="dim")
            table.add_section()
    return table


def _details(result: Result) -> Table:
    table = Table(
        title="Where it goes (p50; assemble + wire + install + other = seconds)", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("recipe", "row"):
        table.add_column(name, no_wrap=True)
    for name in ("assemble", "wire", "install", "other", "stall", "pause", "wire bytes", "trainer mem", "engine mem"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        spreads = (row.assemble_s, row.wire_s, row.install_s, row.other_s, row.stall_s, row.pause_s)
        table.add_row(
            row.recipe if row.row == WSYNC else "",
            row.title,
            *(format_seconds(spread.p50) for spread in spreads),
            format_size(row.wire_bytes),
            format_size(row.trainer_extra_bytes),
            format_size(row.engine_extra_bytes),
            style="bold" if row.row == WSYNC else "",
        )
        if _is_last(result, row):
            table.add_section()
    return table


def _notes(result: Result) -> list[str]:
    memcpy = result.memcpy
    lines = [
        f"limit: (trainer bytes + engine bytes) / 2 / {memcpy.gbps:.1f} GB/s "
        f"({memcpy.copier} on {memcpy.num_cores} cores, measured in this run)",
        f"disk: {result.conditions['disk']}; tmpfs: {result.conditions['tmpfs']}; "
        f"baselines quantise on {result.conditions['baselines quantise on']}",
        machine_line(result.machine, result.versions),
    ]
    lines += [f"WRONG: {row.recipe}, {row.title}: {row.verdict}" for row in result.rows if row.verdict != "ok"]
    if result.verdict == "ok":
        lines.append("verdict: every byte of every row and repeat equals an engine that loaded a checkpoint")
    return lines


def _is_last(result: Result, row: RowResult) -> bool:
    return row.row == result.options.rows[-1]


def verdict_text(verdict: str) -> Text:
    """``ok``, or ``WRONG``."""
    return Text("ok", "green") if verdict == "ok" else Text("WRONG", "bold red")


def machine_line(machine: dict[str, Any], versions: dict[str, str | None]) -> str:
    """What it was measured on and with."""
    return (
        f"machine: {machine['cpu']}, {machine['num_cores']} cores, {format_size(machine['memory_bytes'])}; "
        f"torch {versions['torch']}, wsync {versions['wsync-rl']}"
    )
