"""Many machines at a glance: a tile each, those with faults first, a square for each GPU and NIC."""

from __future__ import annotations

import math

from wsync.topo.findings import SEVERITY_RANK, Severity
from wsync.topo.model import Machine
from wsync.topo.render.health import find_health
from wsync.topo.render.scene import INKS, SHADE, SOFT, Rect, Shape, Text, shorten
from wsync.topo.report import MachineReport

WIDTH, GAP = 190.0, 12.0
SIDE, SPACE = 13.0, 4.0
PER_ROW = 10
_HEAD = 26.0
Tile = tuple[str, Machine, MachineReport]


def draw_fleet(tiles: list[Tile]) -> tuple[list[Shape], float, float]:
    """Shapes, width and height of a grid of tiles, about twice as wide as high.

    Args:
        tiles: name, machine and verdict of each.
    """
    tiles = sorted(tiles, key=lambda t: -SEVERITY_RANK[t[2].verdict])
    height = _HEAD + SIDE + max((_rows(m) for _, m, _ in tiles), default=1) * (SIDE + SPACE)
    columns = max(4, math.ceil(math.sqrt(2 * len(tiles) * height / WIDTH)))
    shapes: list[Shape] = []
    for i, tile in enumerate(tiles):
        x, y = GAP + i % columns * (WIDTH + GAP), GAP + i // columns * (height + GAP)
        shapes += _tile(tile, x, y, height)
    rows = -(-len(tiles) // columns)
    return shapes, GAP + min(columns, len(tiles)) * (WIDTH + GAP), GAP + rows * (height + GAP)


def _rows(machine: Machine) -> int:
    return -(-len(machine.gpus) // PER_ROW) + -(-len(machine.nics) // PER_ROW)


def _tile(tile: Tile, x: float, y: float, height: float) -> list[Shape]:
    name, machine, report = tile
    ink = INKS[None if report.verdict == "OK" else report.verdict]
    health = find_health(machine, report)
    first = report.findings[0] if report.verdict != "OK" and report.findings else None
    title = f"{first.id}: {first.evidence}" if first else name
    shapes: list[Shape] = [Rect(x, y, WIDTH, height, ink.fill, ink.stroke, 1.2 if ink.mark == "" else 2.4, title=title)]
    shapes.append(Text(x + 8, y + 17, shorten(name, WIDTH - 60, 11), 11, bold=True))
    shapes.append(Text(x + WIDTH - 8, y + 17, f"{report.verdict} {ink.mark}".strip(), 9.5, "end", fill=SOFT))
    row_y = y + _HEAD + 4
    for labels in ([g.label for g in machine.gpus], [n.label for n in machine.nics]):
        for i, label in enumerate(labels):
            row, column = divmod(i, PER_ROW)
            severity = health.of_device(label) or health.of_links(label)
            shapes += _square(label, severity, x + 8 + column * (SIDE + SPACE), row_y + row * (SIDE + SPACE))
        row_y += -(-len(labels) // PER_ROW) * (SIDE + SPACE) + 2
    return shapes


def _square(label: str, severity: Severity | None, x: float, y: float) -> list[Shape]:
    ink = INKS[severity]
    radius = 2.0 if label.startswith("GPU") else SIDE / 2
    fill = SHADE if severity is None and radius > 2 else ink.stroke
    shapes: list[Shape] = [Rect(x, y, SIDE, SIDE, fill, ink.stroke, 1.2, radius, title=label)]
    if ink.mark:
        shapes.append(Text(x + SIDE / 2, y + 10, ink.mark, 9, "middle", True, "#FFFFFF"))
    return shapes
