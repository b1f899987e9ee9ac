"""State of GPUs that breaks peers: lost, MIG, fabric not up, errors in the kernel's log, boards that lack a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.checks.links import ISOLATED_REMEDY
from wsync.topo.findings import Finding
from wsync.topo.platforms import UNKNOWN

BAD_HEALTH = ("bandwidth", "route", "access timeout", "incorrect", "recovery")


def check_gpus(case: Case) -> Iterator[Finding]:
    """GPUs answer, are not cut into MIG instances, and need no reset."""
    lost = [g for g in case.view.gpus if g.lost]
    if lost:
        yield case.finding(
            "gpu.lost",
            "CRIT",
            lost,
            f"the driver cannot talk to {names(lost)}",
            "an answer",
            "drain the node and power-cycle it; a GPU that falls off the bus again must be replaced",
        )
    cut = [g for g in case.view.gpus if g.mig]
    if cut:
        yield case.finding(
            "gpu.mig",
            "WARN",
            cut,
            f"MIG is enabled on {names(cut)}: no NVLink and no P2P",
            "MIG off",
            "nvidia-smi -mig 0, then reset the GPU",
        )
    reset = [g for g in case.view.gpus if g.reset_required]
    if reset:
        yield case.finding("gpu.reset-required", "CRIT", reset, f"{names(reset)} must be reset", remedy="nvidia-smi -r")
    remap = [g for g in case.view.gpus if g.remap_failed]
    if remap:
        yield case.finding(
            "gpu.remap-failed", "CRIT", remap, f"row remapping failed on {names(remap)}", remedy="replace the GPU"
        )
    yield from _check_count(case)


def _check_count(case: Case) -> Iterator[Finding]:
    count = len(case.view.gpus)
    cut = any(not g.shown for g in case.view.gpus) or case.machine.gaps
    if cut:
        return
    if case.profile is UNKNOWN:
        yield from _check_unknown_board(case)
        return
    if case.profile.board_sizes == () or case.shape.joined == "bridge" or count < 5:
        return
    if count not in case.profile.board_sizes:
        size = next((s for s in case.profile.board_sizes if s > count), count)
        yield case.finding(
            "gpu.count",
            "WARN",
            [],
            f"{count} GPUs are in sight; boards of {case.profile.name} come with {size}",
            f"{size} GPUs",
            "see `lspci -d 10de:` and the kernel log for GPUs that the driver does not list",
        )


def _check_unknown_board(case: Case) -> Iterator[Finding]:
    """Of a model that no input names: boards with NVSwitch have 4, 8 or 16 GPUs, numbered without a gap."""
    indices = [g.index for g in case.view.gpus]
    if case.shape.joined != "switch":
        return
    holes = [f"GPU{i}" for i in range(max(indices)) if i not in indices]
    size = next((s for s in (8, 16) if s >= len(indices)), len(indices))
    odd = 4 < len(indices) < size
    if holes or odd:
        lacking = f", {names(holes)} not among them" if holes else ""
        yield case.finding(
            "gpu.count",
            "WARN",
            [],
            f"{len(indices)} GPUs on NVSwitches are in sight{lacking}",
            f"{size if odd else max(indices) + 1} GPUs, unless a container or a tenant has a part of the board",
            "see `lspci -d 10de:` and the kernel log for GPUs that the driver does not list",
        )


SWITCHES = {("a100-sxm", 8): 6, ("a100-sxm", 16): 12, ("h100-sxm", 8): 4, ("v100-sxm", 16): 12}
"""NVSwitches of a board, by profile and number of GPUs. Source: HGX and DGX data sheets."""


def check_switches(case: Case) -> Iterator[Finding]:
    """A board has all its NVSwitches; links to a missing one are lost for every GPU."""
    seen = [d for d in case.machine.pci if d.kind == "nvswitch"]
    expected = SWITCHES.get((case.profile.name, len(case.view.gpus)))
    if seen and expected is not None and len(seen) < expected:
        yield case.finding(
            "nvswitch.missing",
            "CRIT",
            seen,
            f"{len(seen)} NVSwitches are in sight",
            f"{expected} ({case.profile.name})",
            "power-cycle the node; see the kernel log for SXid errors",
        )


def check_fabric(case: Case) -> Iterator[Finding]:
    """The fabric manager has finished, with success, and one domain has one cluster and clique."""
    for gpu in case.view.gpus:
        fabric = gpu.fabric
        if fabric is None:
            continue
        bad_state = fabric.state is not None and fabric.state != "Completed"
        bad_status = fabric.status is not None and fabric.status != "Success"
        if bad_state or bad_status:
            yield case.finding(
                "fabric.state",
                "CRIT",
                [gpu],
                f"fabric of {gpu.label}: {fabric.state}, {fabric.status}",
                "Completed, Success",
                "see `systemctl status nvidia-fabricmanager` and its log; restart it",
            )
        degraded = {k: v for k, v in fabric.health.items() if _is_bad(k, v)}
        if degraded:
            shown = ", ".join(f"{k} {v}" for k, v in sorted(degraded.items()))
            yield case.finding(
                "fabric.health", "WARN", [gpu], f"fabric health of {gpu.label}: {shown}", "healthy", ISOLATED_REMEDY
            )
    for field in ("cluster", "clique"):
        values = {getattr(g.fabric, field) for g in case.view.gpus if g.fabric is not None} - {None}
        if len(values) > 1:
            yield case.finding(
                "fabric.split",
                "CRIT",
                list(case.view.gpus),
                f"GPUs of one host are of {len(values)} fabric {field}s",
                "one",
                "correct the partition in the fabric manager",
            )


def _is_bad(key: str, value: str) -> bool:
    good = ("Full", "False", "No", "None", "Healthy", "OK", "N/A", "Not Supported", "0")
    return any(word in key.lower() for word in (*BAD_HEALTH, "summary")) and value not in good
