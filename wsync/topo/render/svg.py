"""A `Scene` as SVG text.

Written here rather than by matplotlib: the same report gives the same bytes whatever is installed, a node needs no
matplotlib to be drawn, and each part tells its finding under the pointer.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from wsync.topo.render.scene import PAPER, Arc, Line, Rect, Scene, Shape, Text

FONTS = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"


def svg_text(scene: Scene) -> str:
    """The whole document."""
    size = f'width="{_n(scene.width)}" height="{_n(scene.height)}" viewBox="0 0 {_n(scene.width)} {_n(scene.height)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONTS}">',
        f"<title>{_clean(scene.title)}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        *map(_shape, scene.shapes),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _shape(shape: Shape) -> str:
    if isinstance(shape, Text):
        weight = ' font-weight="bold"' if shape.bold else ""
        place = f'x="{_n(shape.x)}" y="{_n(shape.y)}" font-size="{_n(shape.size)}" text-anchor="{shape.anchor}"'
        return f'<text {place} fill="{shape.fill}"{weight}>{_clean(shape.text)}</text>'
    stroke = f'stroke="{shape.stroke}" stroke-width="{_n(shape.line)}"'
    if shape.dash:
        stroke += f' stroke-dasharray="{" ".join(map(_n, shape.dash))}"'
    if isinstance(shape, Rect):
        box = f'x="{_n(shape.x)}" y="{_n(shape.y)}" width="{_n(shape.width)}" height="{_n(shape.height)}"'
        return _titled("rect", f'{box} rx="{_n(shape.radius)}" fill="{shape.fill}" {stroke}', shape.title)
    if isinstance(shape, Line):
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
        return _titled("polyline", f'points="{points}" fill="none" {stroke}', shape.title)
    return _titled("path", f'd={quoteattr(_path(shape))} fill="none" {stroke}', shape.title)


def _path(arc: Arc) -> str:
    (x0, y0), (x1, y1) = arc.start, arc.end
    # Both control points at this height make a cubic whose middle is at `top`.
    control = arc.top + (arc.top - (y0 + y1) / 2) / 3
    return f"M {_n(x0)} {_n(y0)} C {_n(x0)} {_n(control)} {_n(x1)} {_n(control)} {_n(x1)} {_n(y1)}"


def _titled(tag: str, attributes: str, title: str) -> str:
    return f"<{tag} {attributes}><title>{_clean(title)}</title></{tag}>" if title else f"<{tag} {attributes}/>"


def _clean(text: str) -> str:
    return escape("".join(c if c.isprintable() else " " for c in text))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
