"""A `Scene` as PNG, drawn by matplotlib: the shapes of the SVG, number for number."""

from __future__ import annotations

import io
from typing import Any

from wsync.errors import ConfigError
from wsync.topo.render.scene import Arc, Line, Rect, Scene, Shape, Text

PIXELS_PER_INCH = 100
MAX_SIDE = 16_000
"""Pixels; larger pictures are drawn smaller."""


def png_bytes(scene: Scene, scale: float = 1.5) -> bytes:
    """The picture, ``scale`` times as many pixels as the scene has.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("PNG pictures need matplotlib", hint="pip install 'wsync-rl[topo]', or write --svg") from e
    scale = min(scale, MAX_SIDE / max(scene.width, scene.height))
    with rc_context({"font.family": "DejaVu Sans", "text.usetex": False, "text.parse_math": False}):
        figure = Figure(figsize=(scene.width / PIXELS_PER_INCH, scene.height / PIXELS_PER_INCH))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, scene.width)
        axes.set_ylim(scene.height, 0)
        axes.set_axis_off()
        for order, shape in enumerate(scene.shapes):
            _draw(axes, shape, order)
        out = io.BytesIO()
        # Without the version of matplotlib in it, the same report gives the same bytes.
        figure.savefig(out, format="png", dpi=PIXELS_PER_INCH * scale, metadata={"Software": None})
    return out.getvalue()


def _draw(axes: Any, shape: Shape, order: int) -> None:
    if isinstance(shape, Text):
        align = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        weight = "bold" if shape.bold else "normal"
        axes.text(
            shape.x, shape.y, _clean(shape.text), size=_points(shape.size), ha=align, va="baseline",
            weight=weight, color=shape.fill, zorder=order,
        )  # fmt: skip
        return
    axes.add_patch(_patch(shape, order))


def _patch(shape: Rect | Line | Arc, order: int) -> Any:
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    width = _points(shape.line)
    dash: Any = (0, [_points(d) / width for d in shape.dash]) if shape.dash else "solid"
    if shape.dash:
        # Matplotlib counts dashes in line widths.
        dash = (0, [d / shape.line for d in shape.dash])
    style = {"edgecolor": shape.stroke, "linewidth": width, "linestyle": dash, "zorder": order}
    if isinstance(shape, Rect):
        box = f"round,pad=0,rounding_size={shape.radius}" if shape.radius else "square,pad=0"
        return FancyBboxPatch(
            (shape.x, shape.y), shape.width, shape.height, boxstyle=box, facecolor=shape.fill, **style
        )
    if isinstance(shape, Line):
        return PathPatch(Path(list(shape.points)), facecolor="none", capstyle="butt", **style)
    (x0, y0), (x1, y1) = shape.start, shape.end
    control = shape.top + (shape.top - (y0 + y1) / 2) / 3
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    points = [(x0, y0), (x0, control), (x1, control), (x1, y1)]
    return PathPatch(Path(points, codes), facecolor="none", capstyle="butt", **style)


def _points(pixels: float) -> float:
    return pixels * 72 / PIXELS_PER_INCH


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
