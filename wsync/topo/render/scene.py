"""Shapes of a picture, and the ink that each health is drawn with. Pixels; y grows downwards."""

from __future__ import annotations

import msgspec

from wsync.topo.findings import Severity

INK = "#1F2933"
SOFT = "#616E7C"
FAINT = "#CBD2D9"
PAPER = "#FFFFFF"
SHADE = "#F2F5F8"


class Ink(msgspec.Struct, frozen=True):
    """How one health looks: never by colour alone.

    Attributes:
        stroke: of lines and borders.
        fill: of boxes.
        width: of lines.
        dash: lengths of strokes and gaps.
        mark: in the corner of a box.
        name: in the legend.
    """

    stroke: str
    fill: str
    width: float
    dash: tuple[float, ...] = ()
    mark: str = ""
    name: str = ""


# Blue, amber, dark red and grey stay apart for every common colour blindness; tests measure it.
OK = Ink("#2171B5", "#EAF2FA", 1.8, name="OK")
INKS: dict[Severity | None, Ink] = {
    None: OK,
    "INFO": OK,
    "WARN": Ink("#E8A202", "#FDF3D7", 3.0, (9, 3), "!", "WARN"),
    "CRIT": Ink("#A50F15", "#F9DDDC", 3.4, (4, 3), "!!", "CRIT"),
    "UNKNOWN": Ink("#8A949E", "#F2F5F8", 1.8, (1.5, 3), "?", "UNKNOWN or not told"),
}


class Rect(msgspec.Struct, frozen=True):
    """A box; ``title`` appears under the pointer."""

    x: float
    y: float
    width: float
    height: float
    fill: str = PAPER
    stroke: str = FAINT
    line: float = 1.0
    radius: float = 5.0
    dash: tuple[float, ...] = ()
    title: str = ""


class Line(msgspec.Struct, frozen=True):
    """Straight pieces through all points."""

    points: tuple[tuple[float, float], ...]
    stroke: str = FAINT
    line: float = 1.0
    dash: tuple[float, ...] = ()
    title: str = ""


class Arc(msgspec.Struct, frozen=True):
    """A curve from one point to another that rises to ``top`` between them."""

    start: tuple[float, float]
    end: tuple[float, float]
    top: float
    stroke: str = FAINT
    line: float = 1.0
    dash: tuple[float, ...] = ()
    title: str = ""


class Text(msgspec.Struct, frozen=True):
    """One line of text; ``y`` is its baseline, ``anchor`` is ``"start"``, ``"middle"`` or ``"end"``."""

    x: float
    y: float
    text: str
    size: float = 11.0
    anchor: str = "start"
    bold: bool = False
    fill: str = INK


Shape = Rect | Line | Arc | Text


class Scene(msgspec.Struct, frozen=True):
    """A picture; later shapes lie over earlier ones."""

    width: float
    height: float
    title: str
    shapes: tuple[Shape, ...]


_NARROW = "iljftrI.,:;'|!()[] "
_WIDE = "mwMW@%—"


def text_width(text: str, size: float, bold: bool = False) -> float:
    """An upper estimate of the width of text in DejaVu Sans, which is the widest of the fonts named."""
    ems = sum(0.45 if c in _NARROW else 1.0 if c in _WIDE else 0.79 if c.isupper() else 0.66 for c in text)
    return ems * size * (1.1 if bold else 1.0)


def shorten(text: str, width: float, size: float) -> str:
    """Text that fits, with an ellipsis where it had to be cut."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
