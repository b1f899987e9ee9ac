"""What NCCL's log and graphs say of the machine. NCCL passes over much silently; these lines give it away."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding
from wsync.topo.reference import NCCL_PCIE_LANE_GBPS, PCIE_GENERATION

FULL_CHANNELS = 32
"""Channels of a healthy NVSwitch domain of Hopper and Blackwell; 16 to 24 on some boards."""
FEW_CHANNELS = FULL_CHANNELS // 2
VIRTUAL_GBPS = 1.0
"""No real port of a GPU or NIC is slower: 0.2 is one lane of Gen1, which hypervisors draw."""


def check_channels(case: Case) -> Iterator[Finding]:
    """No NVLS channels and few others: some GPU of the communicator has no NVLink."""
    view = case.machine.nccl
    few = [c for c in view.channels if c.nvls == 0 and c.coll < FEW_CHANNELS] if view else []
    best = max((c.coll for c in view.channels), default=0) if view else 0
    told = any(c.nvls for c in view.channels) if view else False
    # Boards without NVSwitch have no NVLS channels at all: only two channels, or a better line beside it, are proof.
    bad = [c for c in few if told or c.coll <= 2 or 2 * c.coll <= best or _has_switch(case)]
    if bad:
        shown = ", ".join(f"line {c.line}: {c.coll} coll, 0 nvls" for c in bad[:4])
        yield case.finding(
            "nccl.channels-collapsed",
            "CRIT",
            [],
            f"{shown} channels: some GPU of the communicator has no NVLink, and NCCL does not say so",
            f"NVLS channels, and {FULL_CHANNELS} others" if best < FULL_CHANNELS else f"{best} channels, some of NVLS",
            "check every host of the communicator with `wsync topo check`; NCCL_TOPO_DUMP_FILE names the GPU",
        )


def _has_switch(case: Case) -> bool:
    return case.shape.joined == "switch" and case.profile.links == 18


def check_warnings(case: Case) -> Iterator[Finding]:
    """Lines in which NCCL itself complains."""
    for text in case.machine.nccl.warnings if case.machine.nccl else ():
        yield case.finding(
            "nccl.p2p-disabled",
            "CRIT",
            [],
            f"NCCL: {text}",
            "P2P between GPUs that NVLink joins",
            "restart the fabric manager; NCCL_IGNORE_DISABLED_P2P=1 only hides it",
        )


def check_edges(case: Case) -> Iterator[Finding]:
    """PCIe links in NCCL's drawing: neither a hypervisor's, nor below the GPU's generation."""
    view = case.machine.nccl
    edges = [e for e in view.edges if e.kind == "PCI"] if view else []
    virtual = [e for e in edges if e.rate_gbps < VIRTUAL_GBPS]
    if virtual:
        yield case.finding(
            "vm.virtual-bridge",
            "WARN",
            [e.child for e in virtual],
            f"NCCL draws {len(virtual)} PCIe links at {min(e.rate_gbps for e in virtual):g} GB/s: a hypervisor's",
            "the host's real tree",
            "give NCCL the host's topology with NCCL_TOPO_FILE",
        )
    full = case.profile.pcie_gtps
    if full is None:
        return
    expected = 16 * NCCL_PCIE_LANE_GBPS[full]
    slow = [e for e in edges if VIRTUAL_GBPS <= e.rate_gbps < expected and e.child.startswith("GPU/")]
    if slow:
        gpus = [next((g for g in case.view.gpus if e.child == f"GPU/{g.bus_id}"), e.child) for e in slow]
        rate = min(e.rate_gbps for e in slow)
        yield case.finding(
            "pcie.below-platform",
            "WARN",
            gpus,
            f"NCCL draws {names(gpus)} at {rate:g} GB/s",
            f"{expected:g} GB/s, Gen{PCIE_GENERATION[full]} x16 ({case.profile.name})",
            "check the trained PCIe speed of GPU, switch and slot (lspci -vv, LnkSta)",
        )


def check_net_paths(case: Case) -> Iterator[Finding]:
    """NICs that NCCL reaches over the same kind of path are equally fast."""
    view = case.machine.nccl
    paths = [p for p in view.paths if p.b.startswith("NET/") and p.a.startswith("GPU/")] if view else []
    slow: dict[str, tuple[float, float]] = {}
    for path in paths:
        best = max(p.rate_gbps for p in paths if p.a == path.a and p.kind == path.kind)
        if path.rate_gbps < best:
            slow[path.b] = (path.rate_gbps, best)
    if slow:
        shown = ", ".join(f"{net} {rate:g} of {best:g} GB/s" for net, (rate, best) in sorted(slow.items()))
        yield case.finding(
            "nic.slow",
            "WARN",
            sorted(slow),
            f"NCCL reaches slower than its peers: {shown}",
            "the same for all",
            "take the front-end NIC out of NCCL_IB_HCA (or NCCL_SOCKET_IFNAME)",
        )


def check_graphs(case: Case) -> Iterator[Finding]:
    """NCCL's rings stay on NVLink where the machine has it."""
    view = case.machine.nccl
    rings = [g for g in view.graphs if g.pattern == 4 and g.num_channels] if view else []
    off = [g for g in rings if g.intra_kind in ("PHB", "SYS", "NODE", "PIX", "PXB")]
    if off:
        wired = case.profile.soldered or case.shape.joined in ("switch", "mesh")
        yield case.finding(
            "nccl.ring-off-nvlink",
            "WARN" if wired else "INFO",
            [],
            f"NCCL's ring has {off[0].num_channels} channels of {off[0].intra_gbps:g} GB/s over {off[0].intra_kind}",
            "NVL" if wired else "NVL, if the GPUs have NVLink",
            "look at the system XML of the same run (NCCL_TOPO_DUMP_FILE) for GPUs without <nvlink>",
        )
