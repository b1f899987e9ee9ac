"""What every check gets: a `Case`, a machine with its profile, its wiring and its exemptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from wsync.topo.findings import Finding, Severity, Subject, guide_link
from wsync.topo.model import Gpu, Machine, Nic, PciDevice
from wsync.topo.parse.text import expand
from wsync.topo.platforms import UNKNOWN, Profile, find_profile
from wsync.topo.shape import Shape, find_shape
from wsync.topo.view import View

VIRTUAL_BRIDGES = ("104c:8232", "104c:8233", "1b36:000c", "1b36:0001", "1b36:000e")
"""PCI ids of the bridges that QEMU makes. Source: pci.ids; QEMU ``hw/pci-bridge``."""

_GRACE_CORES = 72


class Case:
    """A machine to be judged.

    Attributes:
        machine: what was read.
        view: its index.
        profile: what to expect of its GPUs.
        shape: how NVLinks join them.
    """

    def __init__(self, machine: Machine, profile: Profile | None = None) -> None:
        self.machine = machine
        self.view = View(machine)
        self.chosen = profile is not None
        self.profile = profile or find_profile(machine)
        self.shape: Shape = find_shape(self.view, self.profile)

    @cached_property
    def links(self) -> int | None:
        """NVLinks that every GPU should have; None if neither the model nor the wiring tells."""
        if self.profile is not UNKNOWN:
            return self.profile.links
        return self.shape.links if self.shape.joined in ("switch", "mesh") else None

    @cached_property
    def coherent(self) -> bool:
        """Grace: GPU memory is coherent with the CPU's, and PCIe distances to NICs mean nothing."""
        gpus = self.machine.gpus
        if self.profile.coherent or any(g.c2c or g.gpu_numa is not None for g in gpus):
            return True
        many = any(len(g.numa or ()) >= 4 for g in gpus)
        blocks = [expand(g.cpus) for g in gpus if g.cpus]
        grace_cpus = bool(blocks) and all(_is_grace_block(b) for b in blocks)
        return many or (grace_cpus and len(gpus) <= 4 and self.shape.links == 18)

    @cached_property
    def virtual_signs(self) -> tuple[str, ...]:
        """Reasons to believe that a hypervisor hides the PCIe tree."""
        signs = []
        devices: list[Gpu | Nic] = [*self.machine.gpus, *self.machine.nics]
        if any(g.virtual for g in self.machine.gpus):
            signs.append("nvidia-smi says that GPUs are passed through")
        if any(d.device_id in VIRTUAL_BRIDGES for d in self.machine.pci):
            signs.append("bridges are those of QEMU")
        if any(n.virtual for n in self.machine.nics):
            signs.append("NICs are virtual functions")
        if not self.machine.declared and devices and all(d.pcie and d.pcie.width == 0 for d in devices):
            signs.append("every PCIe width is 0")
        return tuple(signs)

    @property
    def declared(self) -> bool:
        """The devices come from a hand-written file: what it says of distances is its author's will."""
        return self.machine.declared

    def finding(
        self,
        finding_id: str,
        severity: Severity,
        devices: Iterable[Gpu | Nic | PciDevice | str],
        evidence: str,
        expected: str = "",
        remedy: str = "",
    ) -> Finding:
        """A finding of this machine."""
        subject = subject_of(self.machine.host, devices)
        return Finding(finding_id, severity, subject, evidence, expected, remedy, guide_link(finding_id))


Check = Callable[[Case], Iterator[Finding]]


def subject_of(host: str | None, devices: Iterable[Gpu | Nic | PciDevice | str]) -> Subject:
    """Labels, bus ids and ranks of devices."""
    devices = list(devices)
    labels = tuple(
        d if isinstance(d, str) else d.bus_id or "?" if isinstance(d, PciDevice) else d.label for d in devices
    )
    buses = tuple(d.bus_id for d in devices if not isinstance(d, str) and d.bus_id is not None)
    ranks = tuple(d.rank for d in devices if isinstance(d, Gpu) and d.rank is not None)
    return Subject(host, tuple(dict.fromkeys(labels)), tuple(dict.fromkeys(buses)), ranks)


def names(devices: Iterable[Gpu | Nic | str], limit: int = 8) -> str:
    """``GPU0, GPU3`` with an end."""
    labels = [d if isinstance(d, str) else d.label for d in devices]
    return ", ".join(labels[:limit]) + (f" and {len(labels) - limit} more" if len(labels) > limit else "")


def _is_grace_block(cpus: tuple[int, ...] | None) -> bool:
    if cpus is None or len(cpus) != _GRACE_CORES:
        return False
    return cpus[0] % _GRACE_CORES == 0 and cpus[-1] - cpus[0] == _GRACE_CORES - 1
