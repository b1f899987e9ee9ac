"""Root causes: many findings of one fault become one, with the others as its symptoms."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from wsync.topo.checks.base import Case, subject_of
from wsync.topo.checks.links import MISSING_REMEDY, active_links
from wsync.topo.checks.wiring import spell
from wsync.topo.findings import SEVERITY_RANK, Finding, guide_link
from wsync.topo.model import Gpu

_MANY = 3
"""GPUs from which on an equal loss of all is no chance."""
_MESH_QUADS = ((0, 1, 2, 3), (4, 5, 6, 7))


def find_roots(case: Case, findings: list[Finding]) -> list[Finding]:
    """Findings with those that another explains moved into it, the worst first."""
    findings = _join_equal(findings)
    for group in (_lost_gpu, _common_loss, _short_pairs, _isolated_gpus, _hidden_tree):
        findings = group(case, findings)
    return sorted(findings, key=lambda f: -SEVERITY_RANK[f.severity])


def _join_equal(findings: list[Finding]) -> list[Finding]:
    """One finding for the same thing said of the same devices by several inputs."""
    found: dict[object, Finding] = {}
    for finding in findings:
        key = (finding.id, finding.subject) if finding.subject.devices else (finding.id, finding.evidence)
        known = found.get(key)
        if known is not None and finding.evidence not in known.evidence:
            worse = max(known, finding, key=lambda f: SEVERITY_RANK[f.severity])
            found[key] = replace(worse, evidence=f"{known.evidence}; {finding.evidence}")
        elif known is None:
            found[key] = finding
    return list(found.values())


def _absorb(findings: Iterable[Finding], root: Finding, symptoms: list[Finding]) -> list[Finding]:
    kept = [f for f in findings if f not in symptoms and f is not root]
    return [replace(root, symptoms=(*root.symptoms, *symptoms)), *kept]


def _lost_gpu(case: Case, findings: list[Finding]) -> list[Finding]:
    """Peers lack together as many links as one GPU has, and a board lacks a GPU: that GPU is lost, not their links."""
    missing = [f for f in findings if f.id == "nvlink.links-missing"]
    links = case.links
    count = len(case.view.gpus)
    if not missing or not links or case.shape.joined == "switch" or count + 1 not in (2, 4, 8, 16):
        return findings
    have = {g.label: active_links(g) for g in case.view.gpus}
    short = {label: n for label, n in have.items() if n is not None and n < links}
    if not short:
        sums = {g.label: sum(case.view.links_between[g.index].values()) for g in case.view.gpus}
        short = {label: n for label, n in sums.items() if n < links}
    if sum(links - n for n in short.values()) != links or len(short) < 2:
        return findings
    lost, sure = _which_is_lost(case, [int(label[3:]) for label in short])
    peers = ", ".join(f"{label} {links - n}" for label, n in short.items())
    root = Finding(
        "gpu.lost",
        "CRIT",
        replace(subject_of(case.machine.host, []), devices=(lost,)),
        f"{count} GPUs are listed, and their {links} inactive links ({peers}) are those of the one that is not"
        + ("" if sure else "; which one it was, the numbers do not tell"),
        f"{count + 1} GPUs",
        "not its peers' cables: drain the node, see the kernel log for Xid 79, power-cycle, then replace the GPU",
        guide_link("gpu.lost"),
    )
    return _absorb(findings, root, [*missing, *(f for f in findings if f.id == "gpu.count")])


def _which_is_lost(case: Case, short: list[int]) -> tuple[str, bool]:
    """The GPU of a hybrid cube mesh whose neighbours, renumbered without it, are ``short``."""
    count = len(case.view.gpus)
    indices = [g.index for g in case.view.gpus]
    hole = next((i for i in range(count) if i not in indices), None)
    if hole is not None:
        return f"GPU{hole}", True
    if count == 7:
        for gpu in range(8):
            quad = next(q for q in _MESH_QUADS if gpu in q)
            neighbours = {*quad, (gpu + 4) % 8} - {gpu}
            if {n - (n > gpu) for n in neighbours} == set(short):
                return f"GPU{gpu}", True
    return f"GPU{count}", False


def _common_loss(case: Case, findings: list[Finding]) -> list[Finding]:
    """Every GPU of a switched board lacks the same number of links: what they have in common is a switch."""
    missing = [f for f in findings if f.id == "nvlink.links-missing"]
    gpus = case.view.gpus
    named = {d for f in missing for d in f.subject.devices}
    if len(gpus) < _MANY or case.shape.joined in ("mesh", "bridge") or named != {g.label for g in gpus}:
        return findings
    if case.shape.joined == "unknown" and (case.profile.cube_mesh or "switch" not in case.profile.joined):
        return findings
    counts = {_links_up(case, g) for g in gpus}
    if len(counts) != 1 or not case.links:
        return findings
    count = counts.pop()
    root = case.finding(
        "nvswitch.links-lost",
        "CRIT",
        list(gpus),
        f"all {len(gpus)} GPUs have {count} of {case.links} NVLinks: the links of one switch or more",
        f"{case.links} links of each GPU",
        "see the kernel log for SXid errors and the fabric manager's log; reset all GPUs and switches, else "
        "replace the switch board",
    )
    return _absorb(findings, root, missing)


def _links_up(case: Case, gpu: Gpu) -> int:
    listed = active_links(gpu)
    return listed if listed is not None else max(case.view.links_between[gpu.index].values(), default=0)


def _short_pairs(case: Case, findings: list[Finding]) -> list[Finding]:
    """Two GPUs of an all-to-all mesh lack as many links as their pair has fewer than other pairs: it is the pair."""
    counts = case.view.links_between
    cells = [n for row in counts.values() for n in row.values()]
    if case.shape.joined != "mesh" or not cells:
        return findings
    usual = max(set(cells), key=lambda n: (cells.count(n), n))
    if cells.count(usual) * 2 <= len(cells) or usual * (len(counts) - 1) != case.links:
        return findings
    for (a, b), path in case.view.gpu_paths.items():
        lack = usual - (path.links if path.kind == "NV" else 0)
        ends = (f"GPU{a}", f"GPU{b}")
        about = [f for f in findings if f.id == "nvlink.links-missing" and f.subject.devices in [(e,) for e in ends]]
        whole = all(sum(counts[i].values()) + lack == case.links for i in (a, b))
        if lack > 0 and whole and len(about) == len(ends):
            gpus = [g for g in case.view.gpus if g.label in ends]
            root = case.finding(
                "nvlink.pair-missing",
                "CRIT",
                gpus,
                f"{path.a} and {path.b} are joined by {spell(path)}, other pairs by NV{usual}",
                f"NV{usual}",
                MISSING_REMEDY,
            )
            findings = _absorb(findings, root, about)
    return findings


def _isolated_gpus(case: Case, findings: list[Finding]) -> list[Finding]:
    """What follows for pairs and counters of a GPU without NVLink."""
    for root in [f for f in findings if f.id == "nvlink.gpu-isolated"]:
        name = root.subject.devices[0]
        follows = (
            "p2p.pair-refused",
            "sources.disagree",
            "nvlink.pair-missing",
            "xid.nvlink",
            "nvlink.errors",
            "fabric.state",
        )
        symptoms = [f for f in findings if f.id in follows and _concerns(f, name)]
        if symptoms:
            findings = _absorb(findings, root, symptoms)
    return findings


def _concerns(finding: Finding, name: str) -> bool:
    return name in finding.subject.devices and len(finding.subject.devices) <= 2


_VM = ("vm.tree-hidden", "vm.virtual-bridge", "vm.width-zero", "numa.unknown", "pcie.below-platform", "nic.rate-odd")


def _hidden_tree(case: Case, findings: list[Finding]) -> list[Finding]:
    """A hypervisor that hides the PCIe tree explains every strange distance, width and node of the machine."""
    signs = [f for f in findings if f.id in _VM]
    roots = [f for f in signs if f.id in ("vm.tree-hidden", "vm.virtual-bridge")]
    if not roots or len(signs) == 1:
        return findings
    return _absorb(findings, roots[0], [f for f in signs if f is not roots[0]])
