"""The phases as a Chrome trace (chrome://tracing, ui.perfetto.dev): one track for each process.

Source: "Trace Event Format", complete events (``ph`` = ``X``) in microseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from wsync.bench.options import BenchOptions
from wsync.bench.result import TimedSpan
from wsync.errors import ConfigError


def trace_events(options: BenchOptions, spans: list[TimedSpan]) -> dict[str, Any]:
    """The trace as a JSON object; time 0 is the begin of the first span."""
    start = min((timed.span.begin_s for timed in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for rank in range(options.world_size):
        name = options.rank_name(rank)
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": name}})
        events.append({"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
    for timed in sorted(spans, key=lambda t: (t.rank, t.span.begin_s, -t.span.end_s)):
        span = timed.span
        events.append(
            {
                "name": span.name,
                "cat": f"{timed.recipe},{timed.row}",
                "ph": "X",
                "ts": round((span.begin_s - start) * 1e6, 3),
                "dur": round((span.end_s - span.begin_s) * 1e6, 3),
                "pid": timed.rank,
                "tid": 0,
                "args": {"recipe": timed.recipe, "row": timed.row, "repeat": timed.repeat, "phase": span.phase},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(options: BenchOptions, spans: list[TimedSpan], path: Path) -> None:
    """Write the trace.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.encode(trace_events(options, spans)))
    except OSError as e:
        raise ConfigError(f"the trace {path} cannot be written: {e.strerror}") from e
