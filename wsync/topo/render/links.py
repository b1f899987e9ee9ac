"""NVLinks of a panel: a bar for switches, arcs for meshes and bridges, dashed where they should be and are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsync.topo.checks.links import active_links
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import Gpu
from wsync.topo.render.scene import INK, INKS, PAPER, SOFT, Arc, Ink, Line, Rect, Text, text_width

if TYPE_CHECKING:
    from wsync.topo.render.panel import Panel

BAR, DROP = 28.0, 52.0
STEP, LOWEST = 27.0, 30.0
MAX_ARCS = 40
ROOM = 68.0
_FABRIC = ("nvswitch.", "nvlink.all-lost", "fabric.")


def links_height(panel: Panel) -> float:
    """Pixels that the NVLinks need above the GPUs' frames."""
    height = 14.0
    if _has_bar(panel):
        height += BAR + DROP
    spans = [b - a for a, b in _positions(panel)]
    return height + (LOWEST + STEP * max(spans) if spans else 0.0)


def draw_links(panel: Panel) -> None:
    """Draw them; the places of the GPUs are known by now."""
    if _has_bar(panel):
        _draw_bar(panel)
    elif not _pairs(panel):
        text = {"none": "no NVLink"}.get(panel.report.joined, "NVLinks not told")
        panel.add(Text(14, panel.gpu_y - 20, text, 11, fill=SOFT))
    if len(_pairs(panel)) > MAX_ARCS:
        text = f"{len(_pairs(panel))} pairs with findings, see the table"
        panel.add(Text(14, panel.gpu_y - 20, text, 11, fill=SOFT))
    ends = _ends(panel)
    for (a, b), (i, j) in zip(_shown(panel), _positions(panel), strict=True):
        _draw_arc(panel, a, b, (ends[a, b], ends[b, a]), j - i)


def _has_bar(panel: Panel) -> bool:
    known = any(active_links(g) for g in panel.machine.gpus)
    return panel.report.joined == "switch" or (panel.report.joined == "unknown" and known)


def _order(panel: Panel) -> list[str]:
    return [g.label for f in panel.frames for group in f.groups for g in group.gpus]


def _pairs(panel: Panel) -> list[tuple[str, str]]:
    """Pairs to draw an arc for: all that NVLink joins, or on a switch those with a finding of their own."""
    view, order = panel.view, _order(panel)
    found = {tuple(sorted(p, key=order.index)) for p in panel.health.pairs if p[0] in order and p[1] in order}
    if not _has_bar(panel):
        labels = ((f"GPU{a}", f"GPU{b}") for (a, b), p in view.gpu_paths.items() if p.kind == "NV")
        found |= {tuple(sorted(p, key=order.index)) for p in labels}
    return sorted(((a, b) for a, b in found), key=lambda p: (order.index(p[0]), order.index(p[1])))


def _shown(panel: Panel) -> list[tuple[str, str]]:
    pairs = _pairs(panel)
    return pairs if len(pairs) <= MAX_ARCS else []


def _positions(panel: Panel) -> list[tuple[int, int]]:
    order = _order(panel)
    return [(order.index(a), order.index(b)) for a, b in _shown(panel)]


def _ends(panel: Panel) -> dict[tuple[str, str], float]:
    """Where on a GPU's upper edge the arc to another begins: side by side, so that arcs cross as little as they can."""
    order = _order(panel)
    found = {}
    for gpu in order:
        at = order.index(gpu)
        others = [order.index(b if a == gpu else a) for a, b in _shown(panel) if gpu in (a, b)]
        # From left to right: to the left, nearest first; then to the right, farthest first.
        others.sort(key=lambda o: (o > at, abs(o - at) if o < at else -o))
        step = min(18.0, ROOM / max(1, len(others) - 1))
        for i, other in enumerate(others):
            found[gpu, order[other]] = panel.gpu_x[gpu] + step * (i - (len(others) - 1) / 2)
    return found


def _draw_arc(panel: Panel, a: str, b: str, ends: tuple[float, float], span: int) -> None:
    path = panel.view.path(a, b)
    severity = panel.health.of_pair(a, b)
    finding = panel.health.pairs.get((a, b)) or panel.health.pairs.get((b, a))
    ink = INKS[severity]
    text = "?" if path is None else str(path.links) if path.kind == "NV" else path.kind
    y = panel.gpu_y
    top = y - LOWEST - STEP * span
    title = f"{finding.id}: {finding.evidence}" if finding else f"{a} to {b}: {text} NVLinks"
    panel.add(Arc((ends[0], y), (ends[1], y), top, ink.stroke, ink.width, ink.dash, title))
    _label(panel, sum(ends) / 2, top, text, ink)


def _label(panel: Panel, x: float, y: float, text: str, ink: Ink) -> None:
    """Text over a line, on paper."""
    shown = f"{text} {ink.mark}".strip()
    width = text_width(shown, 10.5) + 8
    panel.add(Rect(x - width / 2, y - 8, width, 16, PAPER, ink.stroke, 0.8, 7))
    panel.add(Text(x, y + 4, shown, 10.5, "middle", True, INK))


def _draw_bar(panel: Panel) -> None:
    ink = INKS[_worst(panel)]
    switches = sum(d.kind == "nvswitch" for d in panel.machine.pci) or _num_targets(panel)
    name = "NVSwitch" if switches < 2 else f"{switches} NVSwitches"
    links = panel.report.links
    text = name + (f": {links} NVLinks from each GPU" if links else "")
    dash: tuple[float, ...] = ()
    if panel.report.joined == "unknown":
        text, dash = "NVLinks: where they lead is not told", INKS["UNKNOWN"].dash
    top, left = 14.0, 14.0
    right = left + max(panel.width - 28, text_width(text, 12, True) + 12)
    panel.add(Rect(left, top, right - left, BAR, ink.fill, ink.stroke, 1.6, 6, dash, title=text))
    panel.add(Text((left + right) / 2, top + 18, text, 12, "middle", True))
    for gpu in panel.machine.gpus:
        _draw_drop(panel, gpu, top + BAR)


def _num_targets(panel: Panel) -> int:
    """Switches that NVLinks lead to by their bus ids; a fabric that NCCL does not name counts as one."""
    targets = {p.target for g in panel.machine.gpus for p in g.peers or () if p.kind == "switch"}
    targets |= {x.remote for g in panel.machine.gpus for x in g.nvlinks or () if x.remote is not None}
    return len(targets)


def _draw_drop(panel: Panel, gpu: Gpu, top: float) -> None:
    count = _count(panel, gpu)
    severity: Severity | None = panel.health.of_links(gpu.label)
    if count is None and severity is None:
        severity = "UNKNOWN"
    ink = INKS[severity]
    x = panel.gpu_x[gpu.label]
    wide = Ink(ink.stroke, ink.fill, ink.width + 1.2, ink.dash, ink.mark)
    finding: Finding | None = panel.health.links.get(gpu.label)
    expected = panel.report.links
    text = "?" if count is None else f"{count} of {expected}" if expected and count < expected else str(count)
    title = f"{finding.id}: {finding.evidence}" if finding else f"{gpu.label}: {text} NVLinks"
    panel.add(Line(((x, top), (x, panel.gpu_y)), wide.stroke, wide.width, wide.dash, title))
    _label(panel, x, top + DROP / 2, text, ink)


def _count(panel: Panel, gpu: Gpu) -> int | None:
    """Links of a GPU, from the driver or NCCL, else from its best pair."""
    listed = active_links(gpu)
    if listed is not None:
        return listed
    counts = panel.view.links_between[gpu.index].values()
    return max(counts, default=None)


def _worst(panel: Panel) -> Severity | None:
    found = [f.severity for f in panel.report.findings if f.id.startswith(_FABRIC) and f.severity != "INFO"]
    return found[0] if found else None
