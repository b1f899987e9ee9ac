"""The tables of ``wsync simulate``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wsync.sim.result import SimResult

_STATES = {"committed": "green", "old version serving": "yellow", "poisoned": "red"}


def print_result(result: SimResult, console: Console, *, max_replicas: int, max_resources: int) -> None:
    """Seconds, replicas, and the busiest resources."""
    console.print(_summary(result))
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if result.events or any(r.fault for r in result.replicas):
        for event in result.events:
            console.print(f"{event.time_s:.3f} s: {event.what}", markup=False, highlight=False)
        console.print(
            f"{result.resent} buckets were sent again, {result.adopted} hops got another sender", highlight=False
        )
    console.print(_replicas(result, max_replicas))
    console.print(_resources(result, max_resources))


def _summary(result: SimResult) -> Table:
    table = Table(title=f"wsync simulate {result.name}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    score = "-" if result.score is None else f"{result.score:.3f}"
    table.add_row("simulated", _seconds(result.simulated_s), _simulated(result))
    table.add_row("lower bound", _seconds(result.lower_bound_s), result.binding_cut)
    table.add_row("score", score, Text(result.no_score or "simulated over lower bound"))
    table.add_row("plan", _seconds(result.plan_s), "what the plan predicts")
    if result.published_s is not None:
        table.add_row("published", _seconds(result.published_s), "what a peer takes")
    table.add_row("stall", _seconds(result.stall_s), "until the trainers may change their weights")
    for phase, end_s in result.phases.items():
        table.add_row(f"  {phase}", _seconds(end_s), "ended everywhere")
    table.add_row("packed", f"{result.wire_bytes / 1e9:,.1f} GB", f"{result.num_buckets} buckets")
    table.add_row("received", f"{result.delivered_bytes / 1e9:,.1f} GB", f"{result.num_hops} hops")
    table.add_row(
        "planned in",
        _seconds(result.plan_wall_s),
        f"simulated in {_seconds(result.sim_wall_s)}, {result.num_events} events",
    )
    return table


def _simulated(result: SimResult) -> str:
    return "no replica committed" if result.simulated_s is None else "publish to the last commit"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def _replicas(result: SimResult, limit: int) -> Table:
    table = Table(title="replicas", title_justify="left")
    for name in ("replica", "state", "staged", "committed", "why"):
        table.add_column(name, justify="right" if name in ("staged", "committed") else "left")
    # Those that did not commit first, then the slowest.
    order = sorted(result.replicas, key=lambda r: (r.commit_s is not None, -(r.commit_s or 0.0)))
    for replica in order[:limit]:
        times = [_seconds(t) for t in (replica.staged_s, replica.commit_s)]
        table.add_row(replica.name, Text(replica.state, _STATES[replica.state]), *times, replica.fault)
    if len(order) > limit:
        rest = order[limit:]
        lost = sum(r.commit_s is None for r in rest)
        words = [f"{lost} that did not commit"] * (lost > 0) + [f"{len(rest) - lost} that committed earlier"] * (
            len(rest) > lost
        )
        table.caption = f"and {' and '.join(words)}"
    return table


def _resources(result: SimResult, limit: int) -> Table:
    table = Table(title="busiest", title_justify="left")
    for name in ("resource", "GB/s", "GB", "messages", "busy", "used"):
        table.add_column(name, justify="left" if name == "resource" else "right")
    for use in result.resources[:limit]:
        table.add_row(
            use.name,
            f"{use.rate_gbps:g}",
            f"{use.nbytes / 1e9:,.2f}",
            str(use.messages),
            _seconds(use.busy_s),
            f"{use.utilisation:.1%}",
        )
    return table
