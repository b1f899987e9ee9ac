"""The tables of ``wsync bench vllm`` on stdout. ``docs/measurement.md`` defines every column."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from wsync.bench.figures import format_range, format_seconds, format_size
from wsync.bench.options import WSYNC
from wsync.bench.table import machine_line, verdict_text
from wsync.bench.vllm_options import IN_PLACE, PACKED, RELOAD
from wsync.bench.vllm_result import PAUSE_EXTRA_S, PAUSE_FACTOR, RELOAD_FACTOR, VLLMMode, VLLMResult, VLLMRow


def print_vllm_result(result: VLLMResult, console: Console) -> None:
    """Two tables (how long; what the clients saw), the bars, and what they were measured on."""
    options = result.options
    console.print(
        f"[bold]wsync bench vllm[/bold]: {options.model_name}, {format_size(result.trainer_bytes)} in bf16, one "
        f"trainer process -> vLLM {result.vllm_version}, {options.num_clients} clients, {options.repeats} repeats"
    )
    console.print(_times(result))
    console.print(_serving(result))
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


def _times(result: VLLMResult) -> Table:
    table = _table("Until the server generates with the new weights")
    for name in ("p50", "min - max", "x reload", "x written reload", "x packed reload", "stall"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for mode in result.modes:
        for row in mode.rows:
            table.add_row(
                *_labels(row),
                format_seconds(row.seconds.p50),
                format_range(row.seconds),
                f"{row.of_reload:.2f}",
                f"{row.of_written_reload:.2f}",
                "" if row.of_packed_reload is None else f"{row.of_packed_reload:.2f}",
                format_seconds(row.stall_s.p50),
                verdict_text(row.verdict),
                style=_style(row),
            )
            if row.row == RELOAD:
                written = row.seconds_with_prepare
                table.add_row("", "  with writing it", format_seconds(written.p50), format_range(written), style="dim")
        table.add_section()
    return table


def _serving(result: VLLMResult) -> Table:
    table = _table("What it costs the server and its clients (p50)")
    for name in ("engine pause", "of memcpy", "server pause", "longest wait", "tokens/s before", "during", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for mode in result.modes:
        for row in mode.rows:
            table.add_row(
                *_labels(row),
                "" if row.replica_pause_s is None else format_seconds(row.replica_pause_s.p50),
                "" if row.pause_share is None else f"{row.pause_share:.2f} x",
                format_seconds(row.server_pause_s.p50),
                format_seconds(row.longest_wait_s.p50),
                f"{row.tokens_before.p50:.1f}",
                f"{row.tokens_during.p50:.1f}",
                f"{100 * row.tokens_share.p50:.0f} %",
                style=_style(row),
            )
        table.add_section()
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("mode", "row"):
        table.add_column(name, no_wrap=True)
    return table


def _labels(row: VLLMRow) -> tuple[str, str]:
    return (row.mode if row.row == WSYNC else "", row.title)


def _style(row: VLLMRow) -> str:
    return "bold" if row.row == WSYNC else ""


def _notes(result: VLLMResult) -> list[str]:
    memcpy = result.memcpy
    lines = [line for mode in result.modes for line in _mode_notes(mode)]
    lines += _price(result)
    lines += [
        f"memcpy: bytes that the engine takes / {memcpy.gbps:.1f} GB/s ({memcpy.copier} on {memcpy.num_cores} cores, "
        "measured in this run)",
        f"checkpoint: {result.conditions['checkpoint']}; servers: {result.conditions['servers']}",
        machine_line(result.machine, result.versions),
    ]
    for row in (row for mode in result.modes for row in mode.rows if row.verdict != "ok"):
        lines.append(f"WRONG: {row.mode}, {row.title}: {row.verdict}")
    if result.verdict == "ok":
        lines.append(
            "verdict: after every repeat wsync's server answered as one that was started with those weights: tokens, "
            "log-probabilities, checksums"
        )
    return lines


def _mode_notes(mode: VLLMMode) -> list[str]:
    ours = mode.row(WSYNC)
    lines = []
    if mode.mode == PACKED and not mode.packed_layers:
        lines.append("packed: on this processor vLLM packs no linear weight: the mode is the same as in-place")
    if ours.replica_pause_s is not None:
        lines.append(
            f"{mode.mode}: engine pause {format_seconds(ours.replica_pause_s.p50)}, bar {PAUSE_FACTOR:g} x memcpy "
            f"({format_seconds(mode.limit_s)}) + {format_seconds(PAUSE_EXTRA_S)} = {format_seconds(mode.pause_bar_s)}: "
            f"{_met(mode.pause_met)}; vLLM's reload takes {ours.of_reload:.1f} x as long, bar {RELOAD_FACTOR:g} x: "
            f"{_met(mode.reload_met)}"
        )
    return lines


def _price(result: VLLMResult) -> list[str]:
    """What generation costs when linear weights stay in place."""
    rates = {mode.mode: mode.row(WSYNC).tokens_before.p50 for mode in result.modes}
    if IN_PLACE not in rates or PACKED not in rates:
        return []
    share = rates[IN_PLACE] / rates[PACKED]
    return [f"in-place: {rates[IN_PLACE]:.1f} tokens/s, packed: {rates[PACKED]:.1f} tokens/s ({share:.2f} x)"]


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"
