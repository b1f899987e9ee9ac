"""A bar chart of the seconds, one panel for each recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsync.bench.options import WSYNC
from wsync.bench.result import Result, RowResult
from wsync.errors import ConfigError

_OURS, _THEIRS, _LIMIT = "#0072b2", "#b8b8b8", "#d55e00"


def write_chart(result: Result, path: Path) -> None:
    """Write a PNG (or what else the suffix says).

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("the chart needs matplotlib", hint="pip install 'wsync-rl[bench]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    recipes = result.options.recipes
    height = 1.1 + len(recipes) * (0.6 + 0.36 * len(result.options.rows))
    figure, panels = pyplot.subplots(len(recipes), 1, figsize=(9, height), sharex=True, squeeze=False)
    for recipe, panel in zip(recipes, panels[:, 0], strict=True):
        _draw(panel, recipe, [row for row in result.rows if row.recipe == recipe])
    panels[-1, 0].set_xlabel("seconds from publish to the last replica committed (p50, bar: min to max)")
    options = result.options
    figure.suptitle(
        f"{options.model_name}, {result.trainer_bytes / 1e9:.3g} GB: {options.num_trainers} trainers to "
        f"{options.num_engines} engines on {result.machine['num_cores']} cores of {result.machine['cpu']}",
        fontsize=10,
    )
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise ConfigError(f"the chart {path} cannot be written: {e}") from e
    finally:
        pyplot.close(figure)


def _draw(panel: Any, recipe: str, rows: list[RowResult]) -> None:
    values = [row.seconds.p50 for row in rows]
    errors = [[row.seconds.p50 - row.seconds.min for row in rows], [row.seconds.max - row.seconds.p50 for row in rows]]
    colours = [_OURS if row.row == WSYNC else _THEIRS for row in rows]
    panel.barh([row.title for row in rows], values, xerr=errors, color=colours, ecolor="#555555", capsize=2)
    panel.axvline(rows[0].limit_s, color=_LIMIT, linewidth=1.2, label=f"limit {rows[0].limit_s:.3g} s")
    right = max(row.seconds.max for row in rows)
    for pos, row in enumerate(rows):
        text = f"{row.seconds.p50:.3g} s" + ("" if row.row == WSYNC else f"   {row.ratio:.1f} x")
        panel.text(row.seconds.max + 0.01 * right, pos, text, va="center", fontsize=8)
    panel.set_xlim(0, right * 1.18)
    panel.invert_yaxis()
    panel.set_title(recipe, loc="left", fontsize=9, fontweight="bold")
    panel.tick_params(labelsize=8)
    panel.legend(loc="lower right", fontsize=7, frameon=False)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
