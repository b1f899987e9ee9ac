"""The matrix of GPU pairs: who is linked with whom, is it the same from both sides, and what follows for a job."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.checks.links import ISOLATED_REMEDY, MISSING_REMEDY
from wsync.topo.findings import Finding
from wsync.topo.model import Gpu, Path


def check_symmetry(case: Case) -> Iterator[Finding]:
    """Both sides of a pair say the same."""
    seen = set()
    for path in case.machine.paths:
        back = case.view.cell(path.b, path.a)
        if back is None or (path.b, path.a) in seen or back.source != path.source:
            continue
        seen.add((path.a, path.b))
        if (back.kind, back.links) != (path.kind, path.links):
            yield case.finding(
                "matrix.asymmetric",
                "CRIT" if "NV" in (path.kind, back.kind) else "WARN",
                _devices(case, path),
                f"{path.a} sees {path.b} over {spell(path)}, {path.b} sees {path.a} over {spell(back)}",
                "the same from both sides",
                "record the table again; if it stays so, reset the GPU with fewer links",
            )


def check_conflicts(case: Case) -> Iterator[Finding]:
    """Two inputs that show the same pair agree on its NVLinks (NCCL passes over a GPU without NVLink silently)."""
    for first, other in case.view.conflicts[:64]:
        yield case.finding(
            "sources.disagree",
            "WARN",
            _devices(case, other),
            f"{other.a} to {other.b}: {spell(first)} ({first.source}), {spell(other)} ({other.source})",
            "the same number of NVLinks in all inputs",
            "record both again at the same time; if they still differ, trust what NCCL sees",
        )


def check_wiring(case: Case) -> Iterator[Finding]:
    """Every pair has the links that the machine's kind of wiring gives it."""
    if case.shape.joined == "none":
        yield from _check_none(case)
    elif case.shape.joined == "switch":
        yield from _check_switch(case)
    elif case.shape.joined == "mesh":
        yield from _check_mesh(case)
    elif case.shape.joined == "bridge":
        yield from _check_bridges(case)


def _check_none(case: Case) -> Iterator[Finding]:
    gpus, profile = list(case.view.gpus), case.profile
    evidence = f"no pair of {len(gpus)} GPUs has NVLink"
    if profile.links == 0:
        advice = "peers over PCIe" if profile.p2p else "host memory"
        text = f"{evidence}; {profile.name} has none, exchange goes over {advice}"
        if profile.p2p:
            yield case.finding("nvlink.none-by-design", "INFO", gpus, text)
        else:
            yield case.finding("p2p.none", "WARN", gpus, text, remedy="plan with host memory rates; NCCL uses SHM")
    elif profile.soldered:
        yield case.finding(
            "nvlink.all-lost",
            "CRIT",
            gpus,
            evidence,
            f"{profile.links} links of each GPU ({profile.name})",
            "start the fabric manager (nvidia-fabricmanager) and look for its errors; check MIG",
        )
    elif "bridge" in profile.joined and profile.links:
        yield case.finding(
            "nvlink.no-bridge",
            "WARN",
            gpus,
            f"{evidence} ({profile.name} takes a bridge)",
            "a bridge between pairs",
            "fit NVLink bridges, or plan with PCIe rates",
        )
    else:
        yield case.finding(
            "nvlink.none",
            "WARN",
            gpus,
            f"{evidence}: exchange goes over PCIe or host memory",
            "NVLink, unless this GPU model has none",
            "say the --platform if the model has no NVLink; else see `nvidia-smi nvlink -s`",
        )


def _known(case: Case, gpu: Gpu) -> dict[int, int]:
    return case.view.links_between[gpu.index]


def _isolated(case: Case, gpu: Gpu) -> Finding:
    over = sorted({p.kind for pair, p in case.view.gpu_paths.items() if gpu.index in pair})
    return case.finding(
        "nvlink.gpu-isolated",
        "CRIT",
        [gpu],
        f"{gpu.label} reaches every other GPU over {' and '.join(over)}, the others have NVLink",
        f"NV{case.shape.links} to its peers" if case.shape.joined == "switch" else f"{case.shape.links} links",
        ISOLATED_REMEDY,
    )


def _check_switch(case: Case) -> Iterator[Finding]:
    links = case.shape.links or 0
    low: set[int] = set()
    for gpu in case.view.gpus:
        counts = _known(case, gpu).values()
        most = max(counts, default=links)
        if not most:
            low.add(gpu.index)
            yield _isolated(case, gpu)
        elif most < links:
            low.add(gpu.index)
            yield case.finding(
                "nvlink.links-missing",
                "CRIT",
                [gpu],
                f"{gpu.label} shows NV{most} to its best peer",
                f"NV{links} to every peer (switch)",
                MISSING_REMEDY,
            )
        elif most > links:
            yield _mismatch(case, gpu, most)
    for (a, b), path in case.view.gpu_paths.items():
        count = path.links if path.kind == "NV" else 0
        if count < links and a not in low and b not in low:
            yield _pair(case, path, f"NV{links}")


def _mismatch(case: Case, gpu: Gpu, count: int) -> Finding:
    return case.finding(
        "platform.mismatch",
        "WARN",
        [gpu],
        f"{gpu.label} shows {count} links, {case.profile.name} has {case.links}",
        "the links of the platform",
        "name the right --platform",
    )


def _pair(case: Case, path: Path, expected: str) -> Finding:
    return case.finding(
        "nvlink.pair-missing",
        "CRIT",
        _devices(case, path),
        f"{path.a} and {path.b} are joined by {spell(path)}",
        expected,
        MISSING_REMEDY,
    )


def _check_mesh(case: Case) -> Iterator[Finding]:
    links = case.shape.links or 0
    others = len(case.view.gpus) - 1
    whole = [g for g in case.view.gpus if len(_known(case, g)) == others]
    sums = {g.index: sum(_known(case, g).values()) for g in whole}
    if others < 4 and _is_cube(case) and all(sums.values()):
        yield case.finding(
            "nvlink.partial-view",
            "INFO",
            whole,
            f"a cube mesh of which {len(whole)} GPUs are in sight",
            "the rest of the links leads to GPUs that this input does not show",
        )
        return
    if sums and links not in sums.values() and len(set(sums.values())) == 1:
        total = next(iter(sums.values()))
        if total < links:
            yield case.finding(
                "nvlink.partial-view",
                "INFO",
                whole,
                f"every GPU shows {total} of {links} links to the GPUs in sight",
                "the rest may lead to GPUs that this input does not show",
            )
        else:
            yield _mismatch(case, whole[0], total)
        return
    for gpu in whole:
        if not sums[gpu.index]:
            yield _isolated(case, gpu)
        elif sums[gpu.index] < links:
            yield case.finding(
                "nvlink.links-missing",
                "CRIT",
                [gpu],
                f"{gpu.label} shows {sums[gpu.index]} links to all its peers",
                f"{links} in sum (mesh)",
                MISSING_REMEDY,
            )
        elif sums[gpu.index] > links:
            yield _mismatch(case, gpu, sums[gpu.index])
    far = [f"{p.a}-{p.b}" for p in case.view.gpu_paths.values() if p.kind != "NV"]
    if far:
        yield case.finding(
            "nvlink.mesh-two-hops",
            "INFO",
            [],
            f"pairs without a link of their own: {names(far)}",
            "a mesh that is not all to all",
            "their traffic takes two NVLink hops through a common peer, or PCIe",
        )


def _is_cube(case: Case) -> bool:
    """A board of V100 or P100, where at most two links join a pair."""
    most = max((p.links for p in case.view.gpu_paths.values()), default=0)
    return case.profile.cube_mesh or (case.profile.links is None and 0 < most <= 2)


def _check_bridges(case: Case) -> Iterator[Finding]:
    pairs = {pair: p for pair, p in case.view.gpu_paths.items() if p.kind == "NV"}
    links = case.shape.links or 0
    power9 = any(8 in (g.numa or ()) for g in case.view.gpus)
    for path in pairs.values():
        # POWER9 machines give each pair 3 of the 6 links, the CPU has the others.
        if path.links < links and not (path.links == 3 and power9):
            yield _pair(case, path, f"NV{links}")
    numa = {g.index: g.numa for g in case.view.gpus}
    crossing = [p for (a, b), p in pairs.items() if numa[a] and numa[b] and numa[a] != numa[b]]
    if crossing:
        # Where every GPU has a NUMA node of its own, all bridges cross, and none is out of order.
        yield case.finding(
            "nvlink.bridge-across-sockets",
            "WARN" if len(crossing) < len(pairs) else "INFO",
            [d for p in crossing for d in _devices(case, p)],
            "bridges join GPUs of two NUMA nodes: " + ", ".join(f"{p.a}-{p.b}" for p in crossing),
            "partners on one socket",
            "do not take neighbours by index: place ranks along the bridges, or move the bridge",
        )
    if len(case.view.gpus) > 2:
        islands = " ".join("{" + ", ".join(map(str, i)) + "}" for i in case.view.islands)
        yield case.finding(
            "nvlink.islands",
            "INFO",
            [],
            f"NVLink domains: {islands}; between them PCIe or the sockets' link",
            remedy=f"ring order {'-'.join(map(str, ring_order(case)))}",
        )


def ring_order(case: Case) -> list[int]:
    """GPUs such that bridge partners are neighbours, and islands follow each other by the nearest PCIe path."""
    from wsync.topo.model import KIND_RANK

    islands = [list(i) for i in case.view.islands]
    islands += [[g.index] for g in case.view.gpus if not any(g.index in i for i in islands)]
    islands.sort()
    order = islands.pop(0)

    def rank(a: int, b: int) -> int:
        path = case.view.gpu_paths.get((min(a, b), max(a, b)))
        return KIND_RANK[path.kind] if path else len(KIND_RANK)

    while islands:
        steps = [(rank(order[-1], start), i, start) for i, island in enumerate(islands) for start in island]
        _, position, start = min(steps)
        island = islands.pop(position)
        order += [start, *(g for g in island if g != start)]
    return order


def spell(path: Path) -> str:
    """``NV12`` or ``SYS``."""
    return f"NV{path.links}" if path.kind == "NV" else path.kind


def _devices(case: Case, path: Path) -> list[Gpu | str]:
    by_label = {g.label: g for g in case.view.gpus}
    return [by_label.get(label, label) for label in (path.a, path.b)]
