"""What the inputs lack. A verdict on half a machine is none."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case
from wsync.topo.findings import Finding
from wsync.topo.platforms import SWITCH_COUNTS

MAX_LINKS = max(SWITCH_COUNTS)
"""NVLinks of the GPU that has most (Rubin)."""


def check_gaps(case: Case) -> Iterator[Finding]:
    """Inputs that could not be read, and parts of inputs that are missing.

    Symmetric tables tell much of a missing row, so that a machine of which at least half of the GPUs are shown is
    judged, and the missing part only named; less than half is UNKNOWN.
    """
    for gap in case.machine.gaps:
        if gap.fatal:
            yield case.finding(
                "input.unreadable", "UNKNOWN", [], gap.what, "a whole file of a known format", "record it again, whole"
            )
    yield from _check_cells(case)
    missing = [g for g in case.machine.gaps if not g.fatal]
    if not missing:
        return
    gpus = case.view.gpus
    shown = sum(g.shown for g in gpus)
    little = 2 * shown < len(gpus) or not (gpus or case.machine.nics)
    text = "; ".join(f"{g.source} lacks {g.what}" for g in missing[:6])
    yield case.finding(
        "input.incomplete",
        "UNKNOWN" if little else "INFO",
        [g for g in gpus if not g.shown],
        f"{text}: {shown} of {len(gpus)} GPUs are described",
        "all of it",
        "record it again, whole: nothing is said of what is missing",
    )


def _check_cells(case: Case) -> Iterator[Finding]:
    """Cells of a matrix that no machine can have."""
    many = [p for p in case.machine.paths if p.kind == "NV" and p.links > MAX_LINKS]
    own = [p for p in case.machine.paths if p.a == p.b]
    for paths, text in ((many, f"no GPU has more than {MAX_LINKS} NVLinks"), (own, "a device has no path to itself")):
        if paths:
            shown = ", ".join(f"{p.a} to {p.b} {p.kind}{p.links or ''}" for p in paths[:4])
            yield case.finding(
                "input.unreadable",
                "UNKNOWN",
                list(dict.fromkeys(p.a for p in paths)),
                f"{shown}: {text}",
                "a table as the tool prints it",
                "record it again, whole",
            )


def check_something(case: Case) -> Iterator[Finding]:
    """At least one fact that a verdict can rest on."""
    m = case.machine
    labels = {g.label for g in m.gpus}
    known = (
        any(p.a in labels or p.b in labels for p in m.paths)
        or m.p2p
        or m.xids
        or m.sxids
        or m.kernel
        or m.hca_lists
        or m.nccl
        or m.oddities
        or any(n.rate_gbit is not None or n.state is not None for n in m.nics)
        or any(g.pcie or g.nvlinks is not None or g.peers is not None or g.fabric or g.lost or g.cpus for g in m.gpus)
        or any(d.pcie or d.kind == "nvswitch" for d in m.pci)
    )
    nameless = bool(m.oddities) and all(o.kind == "class-missing" for o in m.oddities) and not m.gpus
    gaps_tell = any(g.fatal for g in m.gaps) or bool(m.gaps and m.gpus)
    if (not known and not gaps_tell) or nameless:
        have = f"{len(m.gpus)} GPUs, {len(m.nics)} NICs, {len(m.pci)} other devices"
        yield case.finding(
            "input.nothing-to-judge",
            "UNKNOWN",
            [],
            f"the inputs name {have} and say nothing of links or states",
            "a topology",
            "add the output of `nvidia-smi topo -m`, or NCCL's NCCL_TOPO_DUMP_FILE",
        )
