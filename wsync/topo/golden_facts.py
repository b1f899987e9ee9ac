"""What makes two machines equal: facts by name, without what differs from host to host (UUIDs, names, bus ids).

Facts stand in categories. A category that one of two machines has no fact of was not recorded there and does not count;
within a category that both have, every difference counts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from wsync.topo.model import Machine
from wsync.topo.view import View

Facts = Mapping[str, Mapping[str, str]]
"""Category -> name -> value."""

SERIOUS = ("gpus", "nvlink", "pairs", "p2p", "nvswitches", "fabric")
"""Categories in which a difference is a lost part until shown otherwise."""

Row = tuple[str, str, str]


class Difference(msgspec.Struct, frozen=True):
    """One fact that differs; ``None`` where a side does not have it."""

    category: str
    name: str
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        return f"{self.name}: {self.found or 'absent'} (expected {self.expected or 'none'})"


def facts_of(machine: Machine) -> dict[str, dict[str, str]]:
    """Facts of a machine, sorted. Two machines of one kind in one state have the same."""
    found: dict[str, dict[str, str]] = {}
    for rows in (_gpus, _links, _pairs, _nics, _nic_paths, _ports, _places):
        for category, name, value in rows(machine):
            found.setdefault(category, {})[name] = value
    return {c: dict(sorted(found[c].items())) for c in sorted(found)}


def fingerprint(facts: Facts) -> str:
    """A short name of a set of facts."""
    data = msgspec.json.encode({c: dict(sorted(f.items())) for c, f in sorted(facts.items())})
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def differences(expected: Facts, found: Facts) -> tuple[Difference, ...]:
    """Where two sets of facts differ, in the categories that both have."""
    out = []
    for category in expected:
        mine, theirs = expected[category], found.get(category)
        if theirs is None:
            continue
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                out.append(Difference(category, name, mine.get(name), theirs.get(name)))
    return tuple(out)


def _gpus(machine: Machine) -> Iterator[Row]:
    if machine.gpus:
        yield "gpus", "number of GPUs", str(len(machine.gpus))
    for gpu in machine.gpus:
        if gpu.name:
            yield "models", gpu.label, gpu.name
        if gpu.mig is not None:
            yield "mig", gpu.label, "on" if gpu.mig else "off"
        if gpu.lost:
            yield "gpus", gpu.label, "lost"
        if gpu.fabric is not None and gpu.fabric.state:
            yield "fabric", gpu.label, f"{gpu.fabric.state}, {gpu.fabric.status or '?'}"
    switches = sum(d.kind == "nvswitch" for d in machine.pci)
    if switches:
        yield "nvswitches", "number of NVSwitches", str(switches)


def _links(machine: Machine) -> Iterator[Row]:
    for gpu in machine.gpus:
        if gpu.nvlinks is not None and not gpu.nvlinks_cut:
            rates = Counter(link.rate_gbps for link in gpu.nvlinks if link.active)
            text = ", ".join(f"{n} x {r:g} GB/s" if r else f"{n}" for r, n in sorted(rates.items(), key=str))
            yield "nvlink", gpu.label, text or "0"
        if gpu.peers is not None:
            # How many links lead to each place, whatever its bus id is.
            split = sorted((p.count for p in gpu.peers if p.count), reverse=True)
            yield "nvlink of NCCL", gpu.label, "+".join(map(str, split)) or "0"


def _pairs(machine: Machine) -> Iterator[Row]:
    for (a, b), path in View(machine).gpu_paths.items():
        yield "pairs", f"GPU{a}-GPU{b}", f"NV{path.links}" if path.kind == "NV" else path.kind
    for cell in machine.p2p:
        yield "p2p", f"GPU{cell.a}-GPU{cell.b} {cell.capability}".strip(), cell.status


def _nics(machine: Machine) -> Iterator[Row]:
    for nic in machine.nics:
        if nic.rate_gbit is not None:
            yield "rates of NICs", nic.label, f"{nic.rate_gbit:g} Gbit/s"
        if nic.state is not None:
            yield "states of NICs", nic.label, nic.state
        if nic.link_layer is not None:
            yield "link layers", nic.label, nic.link_layer


def _nic_paths(machine: Machine) -> Iterator[Row]:
    for gpu, paths in View(machine).nic_paths.items():
        for nic, kind in paths.items():
            yield "paths to NICs", f"GPU{gpu}-{nic}", kind


def _ports(machine: Machine) -> Iterator[Row]:
    devices = [(g.label, g.pcie) for g in machine.gpus] + [(n.label, n.pcie) for n in machine.nics]
    for label, pcie in devices:
        if pcie is None:
            continue
        if pcie.width is not None:
            yield "PCIe widths", label, f"x{pcie.width}"
        speed = pcie.max_speed_gtps if pcie.max_speed_gtps is not None or pcie.idle else pcie.speed_gtps
        if speed is not None:
            # What an idle GPU trained at is chance; what it can do is not.
            yield "PCIe speeds", label, f"{speed:g} GT/s"


def _places(machine: Machine) -> Iterator[Row]:
    devices = [(g.label, g.numa) for g in machine.gpus] + [(n.label, n.numa) for n in machine.nics]
    for label, numa in devices:
        if numa is not None:
            yield "NUMA nodes", label, ",".join(map(str, numa)) or "none"
    for line in machine.kernel:
        words = sorted(w for w in line.text.split() if w.startswith(("numa=", "iommu=", "intel_iommu=", "amd_iommu=")))
        yield "kernel", "command line", " ".join(words) or "nothing of NUMA and IOMMU"
