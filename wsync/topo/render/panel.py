"""One machine drawn: NVLinks above its GPUs, PCIe switches and NICs below them, in frames of NUMA nodes.

NVSwitch bar, or arcs of a mesh or of bridges       `wsync.topo.render.links`
GPUs
PCIe switches
NICs
CPU bar of the frame
"""

from __future__ import annotations

from itertools import pairwise

from wsync.topo.findings import SEVERITY_RANK, Finding, Severity
from wsync.topo.model import Gpu, Machine, Nic, Pcie
from wsync.topo.reference import generation
from wsync.topo.render.health import Health, find_health
from wsync.topo.render.layout import Frame, Group, find_frames
from wsync.topo.render.links import draw_links, links_height
from wsync.topo.render.scene import INK, INKS, SHADE, SOFT, Ink, Line, Rect, Shape, Text, shorten, text_width
from wsync.topo.report import MachineReport
from wsync.topo.view import View

BOX, GAP = 92.0, 10.0
GPU_HEIGHT, NIC_HEIGHT, SWITCH_HEIGHT, CPU_HEIGHT = 60.0, 46.0, 20.0, 24.0
WIRE = 24.0
PAD, BETWEEN = 14.0, 16.0
_PCIE_IDS = ("pcie.", "nic.down", "nic.slow", "lint.speed-unknown")


class Panel:
    """The picture of one machine, at the origin.

    Attributes:
        shapes: what to draw.
        width, height: pixels.
    """

    def __init__(self, machine: Machine, report: MachineReport) -> None:
        self.machine = machine
        self.report = report
        self.view = View(machine)
        self.health: Health = find_health(machine, report)
        self.shapes: list[Shape] = []
        self.gpu_x: dict[str, float] = {}
        self.frames = find_frames(machine, self._ghosts(), self.health.devices)
        groups = [g for f in self.frames for g in f.groups]
        self.gpu_y = PAD + links_height(self)
        self.switch_y = self.gpu_y + GPU_HEIGHT + WIRE
        self.nic_y = self.switch_y + SWITCH_HEIGHT + WIRE
        rows = max((g.rows for g in groups if g.nics), default=0)
        self.cpu_y = self.nic_y + rows * (NIC_HEIGHT + GAP) + WIRE / 2
        if not rows:
            self.cpu_y = self.switch_y + (SWITCH_HEIGHT + WIRE if any(g.switched for g in groups) else 0)
        self.height = self.cpu_y + CPU_HEIGHT + PAD
        self.width = PAD
        self._draw()

    def _ghosts(self) -> list[Gpu]:
        """GPUs that findings name and that no input lists."""
        have = {g.label for g in self.machine.gpus}
        named = [d for d in self.health.devices if d.startswith("GPU") and d[3:].isdigit() and d not in have]
        return [Gpu(int(d[3:]), shown=False) for d in sorted(named, key=lambda d: int(d[3:]))]

    def add(self, *shapes: Shape) -> None:
        """Draw over what is there."""
        self.shapes += shapes

    def _draw(self) -> None:
        ends: list[tuple[float, float]] = []
        for frame in self.frames:
            left = self.width
            self._draw_frame(frame)
            ends.append((left, self.width - BETWEEN))
        if ends:
            self.width += PAD - BETWEEN
        y = self.cpu_y + CPU_HEIGHT / 2
        placed = [e for e, f in zip(ends, self.frames, strict=True) if f.placed]
        for (_, right), (left, _) in pairwise(placed):
            self.add(Line(((right, y), (left, y)), SOFT, 2.0, title="link between sockets"))
        draw_links(self)

    def _draw_frame(self, frame: Frame) -> None:
        left = self.width
        width = 2 * PAD + sum(map(_group_width, frame.groups)) + GAP * (len(frame.groups) - 1)
        top = self.gpu_y - PAD
        self.add(Rect(left, top, width, self.cpu_y + CPU_HEIGHT - top, SHADE, radius=8))
        if frame.placed:
            self.add(Rect(left, self.cpu_y, width, CPU_HEIGHT, "#D5DDE5", "#D5DDE5", radius=8))
        text = next((t for t in _frame_titles(frame) if text_width(t, 11) < width), _frame_titles(frame)[-1])
        self.add(Text(left + width / 2, self.cpu_y + 16, text, 11, "middle", fill=INK if frame.placed else SOFT))
        x = left + PAD
        for group in frame.groups:
            self._draw_group(group, x, frame)
            x += _group_width(group) + GAP
        self.width = left + width + BETWEEN

    def _draw_group(self, group: Group, x: float, frame: Frame) -> None:
        columns = group.columns
        for i, gpu in enumerate(group.gpus):
            gpu_x = x + i * (BOX + GAP)
            self.gpu_x[gpu.label] = gpu_x + BOX / 2
            bottom = self.switch_y if group.switched else self.cpu_y
            if group.switched or frame.placed:
                self._wire(gpu, gpu_x + BOX / 2, self.gpu_y + GPU_HEIGHT, bottom)
            self._draw_gpu(gpu, gpu_x)
        for i, nic in enumerate(group.nics):
            nic_x = x + i % columns * (BOX + GAP)
            nic_y = self.nic_y + i // columns * (NIC_HEIGHT + GAP)
            if i < columns and group.switched:
                self._wire(nic, nic_x + BOX / 2, self.switch_y + SWITCH_HEIGHT, nic_y)
            elif i >= columns:
                self._wire(nic, nic_x + BOX / 2, nic_y - GAP, nic_y)
            if not group.switched and frame.placed and i >= len(group.nics) - columns:
                self._wire(nic, nic_x + BOX / 2, nic_y + NIC_HEIGHT, self.cpu_y)
            self._draw_nic(nic, nic_x, nic_y)
        if group.switched:
            self._draw_switch(group, x, _group_width(group) - GAP, frame)

    def _draw_switch(self, group: Group, x: float, width: float, frame: Frame) -> None:
        found = [self.health.devices[b] for b in group.bridges if b in self.health.devices]
        worst = max(found, key=lambda f: SEVERITY_RANK[f.severity], default=None)
        ink = INKS[worst.severity if worst else None]
        title = _tell(worst, "PCIe switch " + ", ".join(group.bridges))
        if frame.placed:
            right, middle = x + width, self.switch_y + SWITCH_HEIGHT / 2
            bend = ((right, middle), (right + GAP / 2, middle), (right + GAP / 2, self.cpu_y))
            self.add(Line(bend, ink.stroke, ink.width, ink.dash, title))
        self.add(Rect(x, self.switch_y, width, SWITCH_HEIGHT, ink.fill, ink.stroke, 1.2, 3, title=title))
        self.add(Text(x + width / 2, self.switch_y + 14, "PCIe switch", 9.5, "middle", fill=SOFT))

    def _wire(self, device: Gpu | Nic, x: float, top: float, bottom: float) -> None:
        finding = self.health.devices.get(device.label)
        if finding is not None and not finding.id.startswith(_PCIE_IDS):
            finding = None
        ink = INKS[finding.severity if finding else None]
        c2c = isinstance(device, Gpu) and bool(device.c2c)
        text = "C2C" if c2c else f"PCIe {_spell(device.pcie)}"
        self.add(Line(((x, top), (x, bottom)), ink.stroke, ink.width, ink.dash, _tell(finding, text)))
        if c2c:
            self.add(Text(x + 5, (top + bottom) / 2 + 4, text, 9.5, fill=SOFT))

    def _draw_gpu(self, gpu: Gpu, x: float) -> None:
        ghost = gpu.label not in {g.label for g in self.machine.gpus}
        ink = self._box(gpu.label, x, self.gpu_y, GPU_HEIGHT, not gpu.shown, gpu.name or gpu.label)
        middle = x + BOX / 2
        told = [_short_bus(gpu.bus_id), _spell(gpu.pcie)]
        if not gpu.shown:
            told = ["not listed" if ghost else "not described"]
        self._write(gpu.label, 13, [t for t in told if t], middle, self.gpu_y, GPU_HEIGHT)
        self._mark(ink, x, self.gpu_y)

    def _draw_nic(self, nic: Nic, x: float, y: float) -> None:
        ink = self._box(nic.label, x, y, NIC_HEIGHT, False, nic.bus_id or nic.label)
        middle = x + BOX / 2
        rate = f"{nic.rate_gbit:g} Gbit/s" if nic.rate_gbit is not None else ""
        state = nic.state if nic.state not in (None, "ACTIVE") else ""
        told = " ".join(t for t in (state, rate) if t) or _short_bus(nic.bus_id)
        # A NIC without a name is labelled by its bus id, which stands below.
        name = "NIC" if nic.bus_id is not None and nic.bus_id in nic.label else nic.label
        self._write(
            shorten(name, BOX - 8, 11), 11, [shorten(told, BOX - 4, 9.5)] if told else [], middle, y, NIC_HEIGHT
        )
        self._mark(ink, x, y)

    def _write(self, name: str, size: float, told: list[str], middle: float, y: float, height: float) -> None:
        """A name and smaller lines below it, in the middle of a box."""
        top = y + (height - size - 14 * len(told)) / 2
        self.add(Text(middle, top + size - 2, name, size, "middle", True))
        for i, line in enumerate(told, 1):
            self.add(Text(middle, top + size - 2 + 14 * i, line, 9.5, "middle", fill=SOFT))

    def _box(self, label: str, x: float, y: float, height: float, vague: bool, name: str) -> Ink:
        finding = self.health.devices.get(label)
        severity: Severity | None = finding.severity if finding else "UNKNOWN" if vague else None
        ink = INKS[severity]
        line = 1.4 if severity is None else 2.4
        dash = INKS["UNKNOWN"].dash if vague else ()
        self.add(Rect(x, y, BOX, height, ink.fill, ink.stroke, line, dash=dash, title=_tell(finding, name)))
        return ink

    def _mark(self, ink: Ink, x: float, y: float) -> None:
        if ink.mark:
            self.add(Rect(x + BOX - 19, y - 6, 24, 17, ink.stroke, ink.stroke, 0.5, 8))
            self.add(Text(x + BOX - 7, y + 7, ink.mark, 12, "middle", True, "#FFFFFF" if ink.mark != "!" else INK))


def _group_width(group: Group) -> float:
    return group.columns * (BOX + GAP)


def _frame_titles(frame: Frame) -> list[str]:
    """The longest first."""
    if not frame.placed:
        return ["place not told"]
    nodes = ", ".join(map(str, frame.numa[:4])) + (" …" if len(frame.numa) > 4 else "")
    title = f"NUMA {nodes}" if frame.numa else "CPU"
    return [f"{title} · CPUs {frame.cpus}", title] if frame.cpus else [title]


def _short_bus(bus_id: str | None) -> str:
    return "" if bus_id is None else bus_id.removeprefix("0000:")


def _spell(pcie: Pcie | None) -> str:
    if pcie is None or pcie.speed_gtps is None:
        return ""
    return generation(pcie.speed_gtps) + (f" x{pcie.width}" if pcie.width else "")


def _tell(finding: Finding | None, otherwise: str) -> str:
    return otherwise.strip() if finding is None else f"{finding.severity} {finding.id}: {finding.evidence}"
