"""``topo -p2p``: links that are up are not yet pairs that may use them."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import P2p

CAPABILITIES = {"r": "read", "w": "write", "n": "NVLink", "a": "atomics", "p": "PCIe"}
STATUS = {
    "CNS": "chipset not supported",
    "GNS": "GPU not supported",
    "TNS": "topology not supported",
    "NS": "not supported",
    "DR": "disabled by a registry key",
    "U": "unknown",
}


def check_p2p(case: Case) -> Iterator[Finding]:
    """Pairs may address each other: over NVLink where the machine has it, else at least read and write over PCIe."""
    for capability in sorted({p.capability for p in case.machine.p2p}):
        cells = [p for p in case.machine.p2p if p.capability == capability]
        # Pairs of a mesh that no link joins have no access of their own, which is how the board is made.
        cells = [p for p in cells if p.status == "OK" or not _is_two_hops(case, p)]
        bad = [p for p in cells if p.status != "OK"]
        if bad and capability not in ("a", "p"):
            yield from _check_table(case, capability, cells, bad)


def _is_two_hops(case: Case, cell: P2p) -> bool:
    return case.shape.joined == "mesh" and case.view.links_between.get(cell.a, {}).get(cell.b) == 0


def _check_table(case: Case, capability: str, cells: list[P2p], bad: list[P2p]) -> Iterator[Finding]:
    what = CAPABILITIES.get(capability, "peer") + " access"
    pairs = sorted({(min(p.a, p.b), max(p.a, p.b)) for p in bad})
    all_pairs = {(min(p.a, p.b), max(p.a, p.b)) for p in cells}
    statuses = sorted({p.status for p in bad})
    told = ", ".join(f"{s} ({STATUS.get(s, '?')})" for s in statuses)
    gpus = [g for g in case.view.gpus if any(g.index in pair for pair in pairs)]
    alone = [g for g in gpus if all(p in pairs for p in all_pairs if g.index in p)]
    if len(pairs) == len(all_pairs):
        yield case.finding(
            "p2p.none",
            _severity_of_none(case, capability),
            gpus,
            f"no pair has {what}: {told}",
            "OK for every pair",
            "links can be up and pairs still refused: restart the fabric manager, check MIG, IOMMU and ACS; without "
            "P2P NCCL goes through host memory",
        )
    elif capability != "n" or case.shape.joined == "switch" or case.profile.soldered:
        culprits = alone or gpus
        shown = [f"GPU{a}-GPU{b}" for a, b in pairs]
        yield case.finding(
            "p2p.pair-refused",
            "CRIT" if _has_nvlink(case) else "WARN",
            culprits,
            f"{len(pairs)} of {len(all_pairs)} pairs have no {what}: {names(shown)}: {told}",
            "OK for every pair",
            "reset the GPUs named; check ACS and IOMMU settings of their PCIe switches",
        )


def _has_nvlink(case: Case) -> bool:
    wired = case.shape.joined in ("switch", "mesh", "bridge")
    return wired or case.profile.soldered or any(x.active for g in case.view.gpus for x in g.nvlinks or ())


def _severity_of_none(case: Case, capability: str) -> Severity:
    if case.profile.links == 0 and capability == "n":
        return "INFO"
    if _has_nvlink(case):
        return "CRIT"
    # Who asks for the NVLink table of a machine of unknown model expects NVLinks.
    return "CRIT" if capability == "n" and case.profile.links != 0 and case.shape.joined != "none" else "WARN"
