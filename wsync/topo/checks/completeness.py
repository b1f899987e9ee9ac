"""What the inputs lack. A verdict on half a machine is none."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case
from wsync.topo.findings import Finding


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
    missing = [g for g in case.machine.gaps if not g.fatal]
    if not missing:
        return
    gpus = case.view.gpus
    shown = sum(g.shown for g in gpus)
    little = 2 * shown < len(gpus)
    text = "; ".join(f"{g.source} lacks {g.what}" for g in missing[:6])
    yield case.finding(
        "input.incomplete",
        "UNKNOWN" if little else "INFO",
        [g for g in gpus if not g.shown],
        f"{text}: {shown} of {len(gpus)} GPUs are described",
        "all of it",
        "record it again, whole: nothing is said of what is missing",
    )


def check_something(case: Case) -> Iterator[Finding]:
    """At least one fact that a verdict can rest on."""
    m = case.machine
    known = (
        m.paths
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
    if (not known and not m.gaps) or nameless:
        have = f"{len(m.gpus)} GPUs, {len(m.nics)} NICs, {len(m.pci)} other devices"
        yield case.finding(
            "input.nothing-to-judge",
            "UNKNOWN",
            [],
            f"the inputs name {have} and say nothing of links or states",
            "a topology",
            "add the output of `nvidia-smi topo -m`, or NCCL's NCCL_TOPO_DUMP_FILE",
        )
