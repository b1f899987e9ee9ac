"""PCIe: what ports run at against what they can, and uplinks against what hangs below them."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import Gpu, Nic, PciDevice, Pcie
from wsync.topo.nics import compute_nics
from wsync.topo.reference import generation, pcie_gbps

RESEAT = "reseat the card or its riser, clean the contacts, update the board's firmware, check the slot's bifurcation"


def check_width(case: Case) -> Iterator[Finding]:
    """Every port runs all its lanes."""
    for device, pcie in _ports(case):
        if pcie.width and pcie.max_width and pcie.width < pcie.max_width:
            yield case.finding(
                "pcie.width-reduced",
                _severity(case, device),
                [device],
                f"{_label(device)} runs x{pcie.width} of x{pcie.max_width}",
                f"x{pcie.max_width}",
                RESEAT,
            )


def _severity(case: Case, device: Gpu | Nic | PciDevice) -> Severity:
    """Of an interface without RDMA that no job would use, such as a card for management, nothing slows down."""
    spare = isinstance(device, Nic) and device.rdma is False and device not in compute_nics(case.view, case.coherent)
    return "INFO" if spare else "WARN"


def check_speed(case: Case) -> Iterator[Finding]:
    """Every port runs at its generation. Idle GPUs save power at a lower one: no fault until seen under load."""
    for device, pcie in _ports(case):
        if pcie.speed_gtps is None or pcie.max_speed_gtps is None or pcie.speed_gtps >= pcie.max_speed_gtps:
            continue
        evidence = f"{_label(device)} runs at {generation(pcie.speed_gtps)} of {generation(pcie.max_speed_gtps)}"
        if isinstance(device, Nic) or pcie.idle is False:
            yield case.finding(
                "pcie.speed-reduced",
                _severity(case, device),
                [device],
                evidence,
                generation(pcie.max_speed_gtps),
                RESEAT,
            )
        else:
            yield case.finding(
                "pcie.speed-idle",
                "INFO",
                [device],
                evidence + ", which idle GPUs do to save power",
                generation(pcie.max_speed_gtps) + " under load",
                "read it again while a job runs",
            )


def check_platform_speed(case: Case) -> Iterator[Finding]:
    """GPUs run at the generation of their model, as far as only the running speed is known (NCCL's dump)."""
    full = case.profile.pcie_gtps
    if full is None:
        return
    slow = [
        g
        for g in case.view.gpus
        if g.pcie and g.pcie.speed_gtps and g.pcie.max_speed_gtps is None and g.pcie.speed_gtps < full
    ]
    if not slow:
        return
    seen = generation(min(g.pcie.speed_gtps for g in slow if g.pcie and g.pcie.speed_gtps))
    quiet = case.declared or case.coherent
    yield case.finding(
        "pcie.below-platform",
        "INFO" if quiet else "WARN",
        slow,
        f"{names(slow)} at {seen}" + (", as a hand-written file says" if case.declared else ""),
        f"{generation(full)} ({case.profile.name})",
        RESEAT,
    )


def check_uplinks(case: Case) -> Iterator[Finding]:
    """A switch's uplink is not much slower than the fastest device below it."""
    below = _fastest_below(case)
    slow = []
    for bridge in case.machine.pci:
        rate = pcie_gbps(bridge.pcie.speed_gtps, bridge.pcie.width) if bridge.pcie else None
        fastest = below.get(bridge.bus_id or "")
        if rate is not None and fastest is not None and 2 * rate < fastest:
            slow.append((bridge, rate, fastest))
    if not slow or case.coherent:
        # Grace reaches its GPUs over C2C; the bridges' own ports say nothing.
        return
    bridges = [b for b, _, _ in slow]
    rates = f"{min(r for _, r, _ in slow):.2g} GB/s to the CPU, {max(f for _, _, f in slow):.3g} GB/s below"
    if case.virtual_signs or all(b.pcie and b.pcie.width == 1 for b in bridges):
        yield case.finding(
            "vm.virtual-bridge",
            "WARN",
            bridges,
            f"{len(bridges)} bridges run at {rates}: a hypervisor made them, NCCL believes them (PCI[0.2])",
            "the host's real tree",
            "give NCCL the host's topology with NCCL_TOPO_FILE",
        )
    else:
        yield case.finding(
            "pcie.uplink-slow",
            "INFO" if case.declared else "WARN",
            bridges,
            f"{len(bridges)} uplinks run at {rates} ({_port(bridges[0].pcie)}); paths below are not affected",
            "uplinks as fast as one device",
            "retrain the port (reboot), update the switch's firmware; traffic through host memory is slow until then",
        )


def check_zero_widths(case: Case) -> Iterator[Finding]:
    """Widths of 0, which hypervisors report; NCCL takes them for 16."""
    zero = [d for d, pcie in _ports(case) if pcie.width == 0 and not isinstance(d, PciDevice)]
    if zero:
        labels = [_label(d) for d in zero]
        yield case.finding(
            "vm.width-zero",
            "INFO",
            zero,
            f"PCIe width 0 of {names(labels)}: a hypervisor hides it",
            "x16",
            "read as x16, as NCCL does",
        )


def _fastest_below(case: Case) -> dict[str, float]:
    """For each bridge the rate of the fastest device anywhere below it."""
    parents = {d.bus_id: d.parent for d in case.machine.pci if d.bus_id is not None}
    found: dict[str, float] = {}
    for device, pcie in _ports(case):
        rate = pcie_gbps(pcie.speed_gtps, pcie.width)
        parent = device.parent
        seen: set[str] = set()
        while rate is not None and parent is not None and parent not in seen:
            seen.add(parent)
            found[parent] = max(found.get(parent, 0.0), rate)
            parent = parents.get(parent)
    return found


def _ports(case: Case) -> Iterator[tuple[Gpu | Nic | PciDevice, Pcie]]:
    devices: list[Gpu | Nic | PciDevice] = [*case.view.gpus, *case.view.nics, *case.machine.pci]
    for device in devices:
        if device.pcie is not None:
            yield device, device.pcie


def _label(device: Gpu | Nic | PciDevice) -> str:
    if isinstance(device, PciDevice):
        return device.bus_id or "a device that the input does not name"
    return device.label


def _port(pcie: Pcie | None) -> str:
    return f"{generation(pcie.speed_gtps)} x{pcie.width or 16}" if pcie else "?"
