"""Layouts of the same ranks that a recipe fits, for whom it refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from wsync.describe.engines.grid import ROUND_ROBIN, Grid
from wsync.errors import ConfigError

MAX_LAYOUTS = 3


def working_layouts(grid: Grid, has_experts: bool, describe: Callable[[Grid], object]) -> list[str]:
    """The first layouts that ``describe`` takes, those closest to ``grid`` first."""
    found: list[str] = []
    for layout in dict.fromkeys(_candidates(grid, has_experts)):
        try:
            describe(Grid(layout))
        except ConfigError:
            continue
        found.append(layout)
        if len(found) == MAX_LAYOUTS:
            break
    return found


def _candidates(grid: Grid, has_experts: bool) -> Iterator[str]:
    """Whole experts on as many ranks first, then fewer tensor parallel ranks: as data parallel ones, or replicas."""
    for tp in (n for n in range(grid.tp, 0, -1) if grid.tp % n == 0):
        freed = grid.tp // tp
        if has_experts:
            yield _layout(grid, tp, grid.dp * freed, grid.tp * grid.dp, grid.replicas)
        yield _layout(grid, tp, grid.dp, min(grid.ep, tp * grid.dp), grid.replicas * freed)


def _layout(grid: Grid, tp: int, dp: int, ep: int, replicas: int) -> str:
    degrees = {"tp": tp, "dp": dp, "pp": grid.pp, "ep": ep, "replicas": replicas}
    pairs = [f"{key}={n}" for key, n in degrees.items() if n > 1]
    if grid.placement == ROUND_ROBIN and ep > 1:
        pairs.append(f"placement={ROUND_ROBIN}")
    return ",".join(pairs) or "tp=1"
