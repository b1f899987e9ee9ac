"""A Gantt chart: replicas on top, then the busiest resources, darker where they were busier."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from wsync.errors import ConfigError
from wsync.sim.engine import Resource
from wsync.sim.result import SimResult

MAX_REPLICAS = 16
MAX_RESOURCES = 24
BINS = 400
_LABELS = {"send": " (a rank's messages, one at a time)", "core": " (a rank's own copying)"}
_RECEIVE, _COMMIT, _BUSY, _BOUND = "#b8b8b8", "#0072b2", (0.0, 0.447, 0.698), "#d55e00"


def chart_png(result: SimResult, resources: Sequence[Resource]) -> bytes:
    """The chart.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("the chart needs matplotlib", hint="pip install 'wsync-rl[bench]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    replicas = result.replicas[:MAX_REPLICAS]
    busiest = busiest_of(resources)
    rows = len(replicas) + len(busiest)
    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.22 * rows))
    try:
        _draw_replicas(axes, result, len(replicas))
        for row, resource in enumerate(busiest, start=len(replicas)):
            _draw_resource(axes, row, resource, result.horizon_s)
        axes.axvline(result.lower_bound_s, color=_BOUND, linewidth=1.2, label=f"bound {result.lower_bound_s:.3g} s")
        for event in result.events:
            axes.axvline(event.time_s, color="black", linestyle=":", linewidth=0.8)
        axes.set_yticks(range(rows), [r.name for r in replicas] + [label_of(r) for r in busiest], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, max(result.horizon_s, result.lower_bound_s) * 1.03)
        axes.set_xlabel("seconds from the publish")
        took = "nothing committed" if result.simulated_s is None else f"{result.simulated_s:.3g} s"
        axes.set_title(f"{result.name}: {took}, {result.binding_cut}", loc="left", fontsize=9)
        axes.legend(loc="lower right", fontsize=7, frameon=False)
        figure.tight_layout()
        out = io.BytesIO()
        figure.savefig(out, dpi=150, format="png")
    finally:
        pyplot.close(figure)
    return out.getvalue()


def busiest_of(resources: Sequence[Resource]) -> list[Resource]:
    """The busiest ones, at most a few of each kind, so that one kind does not hide the others."""
    kinds: dict[str, list[Resource]] = {}
    for resource in sorted(resources, key=lambda r: (-r.busy_s, r.name)):
        if resource.services:
            kinds.setdefault(resource.kind, []).append(resource)
    each = max(2, MAX_RESOURCES // max(len(kinds), 1))
    chosen = [r for members in kinds.values() for r in members[:each]]
    return sorted(chosen, key=lambda r: (-r.busy_s, r.name))[:MAX_RESOURCES]


def label_of(resource: Resource) -> str:
    """A resource's name, with what it is where that is no part that one could touch."""
    return f"{resource.name}{_LABELS.get(resource.kind, '')}"


def _draw_replicas(axes: Any, result: SimResult, count: int) -> None:
    for row, replica in enumerate(result.replicas[:count]):
        staged_s = replica.received_until(result.horizon_s)
        axes.barh(row, staged_s, color=_RECEIVE, height=0.7)
        if replica.commit_s is not None:
            width = max(replica.commit_s - staged_s, result.horizon_s * 0.003)
            axes.barh(row, width, left=staged_s, color=_COMMIT, height=0.7)
        elif replica.fault:
            axes.text(0, row, f" {replica.fault}", va="center", fontsize=6)


def _draw_resource(axes: Any, row: int, resource: Resource, seconds: float) -> None:
    width = seconds / BINS
    if width <= 0:
        return
    for index, share in enumerate(busy_shares(resource, seconds)):
        if share > 0.005:
            axes.barh(row, width, left=index * width, color=(*_BUSY, share), height=0.7, linewidth=0)


def busy_shares(resource: Resource, seconds: float) -> list[float]:
    """For each of `BINS` equal parts of the time the share in which a resource was busy."""
    width = seconds / BINS
    shares = [0.0] * BINS
    for begin, end, busy in resource.spans:
        density = busy / (end - begin) if end > begin else 0.0
        for index in range(int(begin / width), min(int(end / width) + 1, BINS)):
            overlap = min(end, (index + 1) * width) - max(begin, index * width)
            shares[index] += max(overlap, 0.0) * density / width
    return [min(share, 1.0) for share in shares]
