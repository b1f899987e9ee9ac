"""``--matrix``: how each GPU sees every GPU and NIC, coloured by health; faults are marked, not only coloured."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from wsync.cli.output import stdout_console
from wsync.cli.topo.table import STYLES
from wsync.topo.findings import Severity
from wsync.topo.model import Machine
from wsync.topo.render.health import Health, find_health
from wsync.topo.report import MachineReport
from wsync.topo.view import View

MARKS: dict[Severity | None, str] = {None: "", "INFO": "", "WARN": "!", "CRIT": "!!", "UNKNOWN": "?"}
LEGEND = (
    "NV18: 18 NVLinks   PIX, PXB: one, several PCIe switches   PHB: CPU's host bridge   NODE: NUMA node",
    "SYS: across sockets   .: not told   !: WARN   !!: CRIT   ?: UNKNOWN",
)
_UNKNOWN = "."


def print_matrix(machine: Machine, report: MachineReport, console: Console | None = None) -> None:
    """Print the matrix; columns that a narrow terminal has no room for follow in further blocks."""
    console = console or stdout_console()
    view, health = View(machine), find_health(machine, report)
    if not view.gpus:
        return
    columns = [g.label for g in view.gpus] + [n.label for n in view.nics]
    rows = [g.label for g in view.gpus]
    cells = {(row, column): _cell(view, health, row, column) for row in rows for column in columns}
    heads = {label: _head(health, label) for label in columns}
    side = max(len(heads[row]) for row in rows)
    for block in _blocks(columns, cells, heads, side, console.width):
        widths = {c: max(len(heads[c]), *(len(cells[row, c]) for row in rows)) for c in block}
        console.print(_line(" " * side, [(heads[c], widths[c]) for c in block]), soft_wrap=True)
        for row in rows:
            line = _line(heads[row], [(cells[row, c], widths[c]) for c in block], side)
            console.print(line, soft_wrap=True)
    for text in LEGEND:
        console.print(Text(text, "dim"))


def _head(health: Health, label: str) -> Text:
    severity = health.of_device(label)
    return Text(label + MARKS[severity], STYLES[severity] if severity else "bold")


def _cell(view: View, health: Health, row: str, column: str) -> Text:
    if row == column:
        return Text("X", "dim")
    path = view.path(row, column)
    severity = health.of_pair(row, column) if column.startswith("GPU") else health.of_device(column)
    if path is None:
        return Text(_UNKNOWN + MARKS[severity], STYLES[severity] if severity else "dim")
    text = f"NV{path.links}" if path.kind == "NV" else path.kind
    return Text(text + MARKS[severity], STYLES[severity] if severity else "green" if path.kind == "NV" else "")


def _blocks(
    columns: list[str], cells: dict[tuple[str, str], Text], heads: dict[str, Text], side: int, width: int
) -> Iterator[list[str]]:
    """Columns in groups that fit into the width, at least one each."""
    block: list[str] = []
    used = side
    for column in columns:
        need = 2 + max(len(heads[column]), *(len(cell) for (_, c), cell in cells.items() if c == column))
        if block and used + need > width:
            yield block
            block, used = [], side
        block.append(column)
        used += need
    yield block


def _line(head: str | Text, cells: list[tuple[Text, int]], side: int = 0) -> Text:
    line = Text()
    line.append_text(head if isinstance(head, Text) else Text(head))
    line.append(" " * (side - len(head)))
    for i, (cell, width) in enumerate(cells):
        last = i == len(cells) - 1
        line.append("  ")
        line.append_text(cell)
        line.append("" if last else " " * (width - len(cell)))
    return line
