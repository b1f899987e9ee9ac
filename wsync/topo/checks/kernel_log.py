"""What NVIDIA's driver wrote to the kernel's log: Xids of GPUs, SXids of NVSwitches.

Source: NVIDIA's Xid catalog; "Fabric Manager for NVIDIA NVSwitch Systems User Guide", SXid errors.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from wsync.topo.checks.base import Case
from wsync.topo.checks.links import ISOLATED_REMEDY
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import Xid

NVLINK_XIDS = {74, 144, 145, 146, 147, 148, 149, 150}
"""NVLink errors; 144 to 150 on Blackwell."""
LOST_XIDS = {79, 119, 120, 154}
"""Fallen off the bus, GSP timeouts and errors, recovery needed."""
MEMORY_XIDS = {48, 64, 95}
"""Double bit errors, rows that could not be remapped, uncontained errors."""

_REMEDIES = {
    79: "drain the node and power-cycle it; if it comes back, reseat or replace the GPU",
    119: "drain the node, reset the GPU (nvidia-smi -r) or power-cycle; if it comes back, update driver and firmware",
    120: "drain the node, reset the GPU (nvidia-smi -r) or power-cycle; if it comes back, update driver and firmware",
    48: "reset the GPU (nvidia-smi -r), which remaps the row; if it comes back, replace the GPU",
    64: "reset the GPU (nvidia-smi -r); if nvidia-smi -q then shows a remapping failure, replace the GPU",
    95: "drain the node and reset the GPU (nvidia-smi -r): every job on it may be wrong",
}
_GROUPS: tuple[tuple[set[int], str, Severity, str], ...] = (
    (NVLINK_XIDS, "xid.nvlink", "CRIT", "NVLink errors"),
    (LOST_XIDS, "xid.lost", "CRIT", "GPUs that fell off the bus or must recover"),
    (MEMORY_XIDS, "xid.memory", "WARN", "errors of memory that were not corrected"),
)


def check_xids(case: Case) -> Iterator[Finding]:
    """Errors of NVLink and of lost GPUs are faults, those of memory warn, others are worth knowing."""
    left = case.machine.xids
    for codes, finding_id, severity, what in _GROUPS:
        hit = [x for x in case.machine.xids if {x.code, x.cause} & codes and not _recovered(x)]
        left = tuple(x for x in left if x not in hit)
        if hit:
            buses = list(dict.fromkeys(x.bus_id for x in hit))
            seen = sorted({c for x in hit for c in (x.code, x.cause) if c in codes})
            gpus = [next((g for g in case.view.gpus if g.bus_id == bus), bus) for bus in buses]
            text = f"Xid {', '.join(map(str, seen))} of {', '.join(buses)}: {what}"
            found = case.finding(finding_id, severity, gpus, text, "no such Xid", _remedy(seen, hit))
            yield replace(found, subject=replace(found.subject, bus_ids=tuple(buses)))
    if left:
        codes_seen = sorted({x.code for x in left})
        yield case.finding(
            "xid.other",
            "INFO",
            sorted({x.bus_id for x in left}),
            f"Xid {', '.join(map(str, codes_seen))} was logged"
            + ("; the driver asks for nothing any more" if any(map(_recovered, left)) else ""),
            remedy="look it up in NVIDIA's Xid catalog",
        )


def _recovered(xid: Xid) -> bool:
    return xid.code == 154 and (xid.action or "").lower() == "none"


def _remedy(codes: list[int], hit: list[Xid]) -> str:
    if set(codes) & NVLINK_XIDS:
        return ISOLATED_REMEDY
    asked = sorted({x.action for x in hit if x.action})
    parts = [f"the driver asks for: {', '.join(asked)}"] if asked else []
    parts += [_REMEDIES[c] for c in codes if c in _REMEDIES]
    return "; ".join(dict.fromkeys(parts)) or "drain the node; nvidia-smi -q names the recovery action"


def check_sxids(case: Case) -> Iterator[Finding]:
    """Fatal errors of a switch stop the traffic of its GPUs; others the driver has dealt with."""
    for fatal in (True, False):
        hit = [x for x in case.machine.sxids if x.fatal is fatal]
        if hit:
            buses = tuple(dict.fromkeys(x.bus_id for x in hit))
            codes = ", ".join(map(str, sorted({x.code for x in hit})))
            found = case.finding(
                "nvswitch.sxid",
                "CRIT" if fatal else "INFO",
                buses,
                f"{'fatal' if fatal else 'non-fatal'} SXid {codes} of {', '.join(buses)}",
                "no such SXid",
                "drain the node, restart the fabric manager, reset all GPUs and switches; if it comes back, have the "
                "switch replaced"
                if fatal
                else "look it up in the Fabric Manager's user guide",
            )
            yield replace(found, subject=replace(found.subject, bus_ids=buses))
