"""A whole picture: title with the verdict, the machines, what is wrong in words, a legend."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from wsync.topo.findings import Finding
from wsync.topo.model import Topology
from wsync.topo.render.fleet import draw_fleet
from wsync.topo.render.panel import Panel
from wsync.topo.render.scene import INK, INKS, SOFT, Arc, Line, Rect, Scene, Shape, Text, shorten, text_width
from wsync.topo.render.summary import count_findings, host_names, plural, root_findings, spell_counts, where
from wsync.topo.report import MachineReport, Report

MAX_PANELS = 4
"""More machines than this are drawn as tiles."""
MARGIN = 18.0
MIN_WIDTH = 720.0
_MAX_TOLD = 5


def draw_topology(topology: Topology, report: Report) -> Scene:
    """The scene of all machines, in the order of the report.

    Args:
        topology: what was read.
        report: its verdict.
    """
    names = host_names(report)
    body: list[Shape] = []
    width, y = MIN_WIDTH, 0.0
    if len(report.machines) > MAX_PANELS:
        tiles = list(zip(names, topology.machines, report.machines, strict=True))
        body, width, y = draw_fleet(tiles)
    else:
        for name, machine, judged in zip(names, topology.machines, report.machines, strict=True):
            panel = Panel(machine, judged)
            shapes = panel.shapes
            if len(names) > 1:
                ink = INKS[None if judged.verdict == "OK" else judged.verdict]
                body.append(Rect(MARGIN, y + 6, 10, 14, ink.stroke, ink.stroke, 1, 2))
                body.append(Text(MARGIN + 18, y + 18, f"{name}: {judged.verdict}", 13, bold=True))
                y += 24
            body += _moved(shapes, 0, y)
            y += panel.height
            width = max(width, panel.width)
    head, head_height = _head(report, names, width)
    told, told_height = _told(report, width)
    legend, legend_height = _legend(len(names) > MAX_PANELS)
    height = head_height + y + told_height + legend_height
    shapes = [*head, *_moved(body, 0, head_height), *_moved(told, 0, head_height + y)]
    shapes += _moved(legend, 0, head_height + y + told_height)
    return Scene(width, height, _title(report, names), tuple(shapes))


def _title(report: Report, names: Sequence[str]) -> str:
    who = (names[0] or "this machine") if len(names) == 1 else plural(len(names), "machine")
    return f"{who}: {report.verdict}"


def _head(report: Report, names: Sequence[str], width: float) -> tuple[list[Shape], float]:
    ink = INKS[None if report.verdict == "OK" else report.verdict]
    title = _title(report, names)
    shapes: list[Shape] = [
        Rect(MARGIN, 16, 10, 42, ink.stroke, ink.stroke, 1, 2),
        Text(MARGIN + 20, 34, shorten(title, width - 60, 19), 19, bold=True),
        Text(MARGIN + 20, 54, shorten(_describe(report), width - 60, 12), 12, fill=SOFT),
    ]
    return shapes, 66.0


def _describe(report: Report) -> str:
    counts = spell_counts(count_findings(report.all_findings()))
    if len(report.machines) != 1:
        bad = sum(m.verdict != "OK" for m in report.machines)
        gpus = sum(m.num_gpus for m in report.machines)
        return f"{plural(gpus, 'GPU')}, {plural(bad, 'machine')} not OK; {counts}"
    return f"{_size(report.machines[0])}; {counts}"


def _size(machine: MachineReport) -> str:
    platform = "" if machine.platform == "unknown" else f"{machine.platform}, "
    return f"{platform}{plural(machine.num_gpus, 'GPU')}, {plural(machine.num_nics, 'NIC')}"


def _told(report: Report, width: float) -> tuple[list[Shape], float]:
    """The worst findings in words."""
    findings = [f for f in root_findings(report) if f.severity != "INFO"]
    shapes: list[Shape] = []
    y = 8.0
    for finding in findings[:_MAX_TOLD]:
        ink = INKS[finding.severity]
        shapes.append(Rect(MARGIN, y, 24, 17, ink.stroke, ink.stroke, 0.5, 8))
        shapes.append(Text(MARGIN + 12, y + 13, ink.mark, 12, "middle", True, "#FFFFFF" if ink.mark != "!" else INK))
        lines = wrap(
            _sentence(finding), int((width - MARGIN - 44) / text_width("x", 11)), max_lines=2, placeholder=" …"
        )
        for line in lines:
            shapes.append(Text(MARGIN + 32, y + 13, line, 11))
            y += 17
        y += 6
    if len(findings) > _MAX_TOLD:
        shapes.append(Text(MARGIN + 32, y + 12, f"and {len(findings) - _MAX_TOLD} more", 11, fill=SOFT))
        y += 20
    return shapes, y + 4


def _sentence(finding: Finding) -> str:
    place = " ".join(p for p in (finding.subject.host, where(finding)) if p)
    return f"{finding.id}{f' ({place})' if place and place not in finding.evidence else ''}: {finding.evidence}"


def _legend(tiles: bool) -> tuple[list[Shape], float]:
    x, y = MARGIN, 14.0
    shapes: list[Shape] = []
    for ink in (INKS[None], INKS["WARN"], INKS["CRIT"], INKS["UNKNOWN"]):
        shapes.append(Line(((x, y), (x + 34, y)), ink.stroke, ink.width, ink.dash))
        name = f"{ink.name} {ink.mark}".strip()
        shapes.append(Text(x + 42, y + 4, name, 11))
        x += 42 + text_width(name, 11) + 22
    text = "squares: GPUs, circles: NICs" if tiles else "numbers on lines: NVLinks"
    shapes.append(Text(x, y + 4, text, 11, fill=SOFT))
    return shapes, 34.0


def _moved(shapes: Sequence[Shape], dx: float, dy: float) -> list[Shape]:
    from msgspec.structs import replace

    found: list[Shape] = []
    for s in shapes:
        if isinstance(s, Line):
            found.append(replace(s, points=tuple((x + dx, y + dy) for x, y in s.points)))
        elif isinstance(s, Arc):
            start, end = ((x + dx, y + dy) for x, y in (s.start, s.end))
            found.append(replace(s, start=start, end=end, top=s.top + dy))
        else:
            found.append(replace(s, x=s.x + dx, y=s.y + dy))
    return found
