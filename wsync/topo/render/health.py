"""Which device and which pair the findings concern: what a table or a picture colours."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from wsync.topo.findings import SEVERITY_RANK, Finding, Severity
from wsync.topo.model import Gpu, Machine, Nic
from wsync.topo.report import MachineReport
from wsync.topo.view import View

_PAIR = ("nvlink.pair-missing", "matrix.asymmetric", "sources.disagree", "nvlink.bridge-across-sockets")
"""Findings of two devices that are about what joins them, not about either."""
_GPU_LINKS = ("nvlink.", "fabric.", "xid.nvlink", "lint.nvlink-self", "gpu.lost")
"""Findings of a device that are about all its NVLinks."""


class Health(msgspec.Struct, frozen=True):
    """What is wrong with each part; what is not in it is well.

    Attributes:
        devices: label of a GPU or NIC, or bus id of another device, to its worst finding.
        links: label of a GPU to the worst finding on its NVLinks.
        pairs: two labels, in the order of the view, to the worst finding on what joins them.
    """

    devices: dict[str, Finding]
    links: dict[str, Finding]
    pairs: dict[tuple[str, str], Finding]

    def of_device(self, label: str) -> Severity | None:
        """Severity of the worst finding on a device."""
        finding = self.devices.get(label)
        return None if finding is None else finding.severity

    def of_links(self, label: str) -> Severity | None:
        """Severity of the worst finding on a GPU's NVLinks."""
        finding = self.links.get(label)
        return None if finding is None else finding.severity

    def of_pair(self, a: str, b: str) -> Severity | None:
        """Severity of the worst finding on what joins two devices, or on all NVLinks of one of them."""
        found = [self.pairs.get((a, b)) or self.pairs.get((b, a)), self.links.get(a), self.links.get(b)]
        return max((f.severity for f in found if f is not None), key=SEVERITY_RANK.__getitem__, default=None)


def find_health(machine: Machine, report: MachineReport) -> Health:
    """Sort a machine's findings above INFO, and what they explain, by what they concern."""
    view = View(machine)
    seen: list[Gpu | Nic] = [*view.nics, *view.gpus]
    by_bus = {d.bus_id: d.label for d in seen if d.bus_id is not None}
    labels = {d.label for d in seen}
    health = Health({}, {}, {})
    for finding, cause in sorted(_spread(report.findings), key=lambda pair: -SEVERITY_RANK[pair[0].severity]):
        devices = [d if d in labels else by_bus.get(d, d) for d in finding.subject.devices]
        if len(devices) == 2 and finding.id in _PAIR:
            health.pairs.setdefault((devices[0], devices[1]), finding)
            continue
        if finding.id == "p2p.pair-refused":
            for pair in _refused(machine, devices):
                health.pairs.setdefault(pair, finding)
        for device in devices:
            links = finding.id.startswith(_GPU_LINKS)
            if links:
                health.links.setdefault(device, finding)
            # Links that another GPU's fault took down are no fault of this one, nor is a tree that the host hides.
            if not finding.id.startswith("vm.") and not (links and not cause):
                health.devices.setdefault(device, finding)
    if report.joined == "mesh":
        _find_pair(health)
    return health


def _find_pair(health: Health) -> None:
    """Two GPUs of a mesh that lack links lack those between them; their other links are well."""
    short = [g for g, f in health.links.items() if f.id == "nvlink.links-missing"]
    if len(short) == 2:
        health.pairs.setdefault((short[0], short[1]), health.links[short[0]])
        for gpu in short:
            del health.links[gpu]


def _spread(findings: Iterable[Finding], cause: bool = True) -> Iterable[tuple[Finding, bool]]:
    """Findings above INFO and what they explain, and whether each is a cause."""
    for finding in findings:
        if finding.severity != "INFO":
            yield finding, cause
            yield from _spread(finding.symptoms, False)


def _refused(machine: Machine, devices: list[str]) -> Iterable[tuple[str, str]]:
    """Pairs of the devices named that may not address each other."""
    for cell in machine.p2p:
        pair = (f"GPU{cell.a}", f"GPU{cell.b}")
        if cell.status != "OK" and (pair[0] in devices or pair[1] in devices):
            yield pair
