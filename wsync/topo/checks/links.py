"""NVLinks of each GPU: how many are active, how fast, where they lead, what they count as errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding
from wsync.topo.model import Gpu
from wsync.topo.parse.text import numbers

ISOLATED_REMEDY = (
    "drain the node; look for Xid 74 or 144-150 in the kernel log, reset the GPU (nvidia-smi -r), restart the fabric "
    "manager; if it comes back without links, replace the GPU or its board"
)
MISSING_REMEDY = "drain the node, reset the GPU; if the link stays down, reseat or replace the GPU (or the bridge)"
ERROR_WARN = 5
"""Recoveries since boot from which on a link is worth a look. Source: Imbue cluster-health; totals alone never fail."""


def active_links(gpu: Gpu) -> int | None:
    """NVLinks that are up, as the driver or NCCL lists them; None if neither does."""
    if gpu.nvlinks is not None and not gpu.nvlinks_cut:
        if not gpu.nvlinks:
            return 0
        states = [link.active for link in gpu.nvlinks]
        if any(s is not None for s in states):
            return sum(s is True for s in states)
    if gpu.peers is not None:
        return sum(p.count for p in gpu.peers)
    return None


def check_counts(case: Case) -> Iterator[Finding]:
    """Every GPU has the links of its model; without a model, no link is inactive and no GPU has fewer than others."""
    counts = {g.index: n for g in case.view.gpus if (n := active_links(g)) is not None}
    if not counts or case.links == 0:
        return
    usual = Counter(counts.values()).most_common(1)[0][0]
    idle = [g for g in case.view.gpus if counts.get(g.index) == 0]
    if len(idle) == len(counts) and not case.profile.soldered:
        yield _no_links(case, idle)
        return
    if _is_part(case, counts):
        yield _part(case, usual)
        return
    for gpu in case.view.gpus:
        count = counts.get(gpu.index)
        if count is None:
            continue
        expected = case.links or max(usual, len(gpu.nvlinks or ()))
        if count == 0:
            yield _isolated(case, gpu, expected)
        elif count < expected:
            yield _missing(case, gpu, count, expected)
        elif count > expected:
            evidence = f"{gpu.label} has {count} NVLinks, {case.profile.name} has {expected}"
            yield case.finding(
                "platform.mismatch", "WARN", [gpu], evidence, "the links of the platform", "name the right --platform"
            )


def _is_part(case: Case, counts: dict[int, int]) -> bool:
    """Whether the machine is a tenant's part of a board: one GPU that has none to link to, or part of a cube mesh."""
    indices = [g.index for g in case.view.gpus]
    if indices == [0]:
        return counts == {0: 0}
    if not case.profile.cube_mesh or sorted(counts) != indices:
        return False
    # Half of a cube mesh keeps 4 or 5 of 6 links; a pair keeps 1 or 2, the same for both.
    pair = indices == [0, 1] and counts[0] == counts[1] and counts[0] in (1, 2)
    return pair or (indices == [0, 1, 2, 3] and sorted(counts.values()) == [4, 4, 5, 5])


def _part(case: Case, count: int) -> Finding:
    gpus = list(case.view.gpus)
    return case.finding(
        "nvlink.partial-view",
        "INFO",
        gpus,
        f"{names(gpus)}: {count} active NVLinks, {len(gpus)} GPUs in sight",
        f"{case.profile.links} if this is the whole board" if case.profile.links else "",
        "links to GPUs that this machine does not have are inactive; if it should have more GPUs, see lspci -d 10de:",
    )


def _no_links(case: Case, gpus: list[Gpu]) -> Finding:
    model = f" ({gpus[0].name})" if gpus[0].name else ""
    return case.finding(
        "nvlink.no-bridge",
        "WARN",
        gpus,
        f"no NVLink is active on {names(gpus)}{model}",
        "a bridge between pairs, if the job needs NVLink; cards without one exchange over PCIe",
        "fit NVLink bridges, or plan with PCIe rates",
    )


def _isolated(case: Case, gpu: Gpu, expected: int) -> Finding:
    said = "NCCL found no NVLink of it" if gpu.nvlinks is None else "all links are inactive"
    return case.finding(
        "nvlink.gpu-isolated",
        "CRIT",
        [gpu],
        f"{gpu.label} has 0 of {expected} NVLinks: {said}",
        f"{expected} active links",
        ISOLATED_REMEDY,
    )


def _missing(case: Case, gpu: Gpu, count: int, expected: int) -> Finding:
    down = [link.index for link in gpu.nvlinks or () if link.active is False]
    which = f", inactive are {numbers(down)}" if down else ""
    # A card with three bridges fitted has 12 links; one or two bridges are a choice, other numbers are a loose one.
    chosen = "bridge" in case.profile.joined and expected == 12 and count in (4, 8)
    return case.finding(
        "nvlink.links-missing",
        "WARN" if chosen else "CRIT",
        [gpu],
        f"{gpu.label} has {count} of {expected} NVLinks{which}",
        f"{expected} active links",
        MISSING_REMEDY,
    )


def check_rates(case: Case) -> Iterator[Finding]:
    """No link runs below the model's rate, or below the others of the machine."""
    rates = {
        g.index: [(x.index, x.rate_gbps) for x in g.nvlinks or () if x.rate_gbps is not None] for g in case.view.gpus
    }
    every = [rate for of_gpu in rates.values() for _, rate in of_gpu]
    if not every:
        return
    nominal = case.profile.link_gbps or Counter(every).most_common(1)[0][0]
    for gpu in case.view.gpus:
        slow = [(index, rate) for index, rate in rates[gpu.index] if rate < nominal]
        if slow:
            yield case.finding(
                "nvlink.link-slow",
                "WARN",
                [gpu],
                f"links {numbers(i for i, _ in slow)} of {gpu.label} run at {min(r for _, r in slow):g} GB/s",
                f"{nominal:g} GB/s each",
                MISSING_REMEDY,
            )


def check_remotes(case: Case) -> Iterator[Finding]:
    """Every GPU reaches the same switches with the same split (4, 5, 5, 4 on H100)."""
    own = {g.bus_id for g in case.view.gpus}
    splits = {g.index: _split(g, own) for g in case.view.gpus}
    known = [s for s in splits.values() if s]
    if len(known) < 3:
        return
    usual = Counter(tuple(sorted(s.values())) for s in known).most_common(1)[0][0]
    targets = Counter(frozenset(s) for s in known).most_common(1)[0][0]
    total = sum(usual)
    for gpu in case.view.gpus:
        split = splits[gpu.index]
        # Fewer links in total are reported as missing links; here the links are there and lead elsewhere.
        if not split or sum(split.values()) != total:
            continue
        if tuple(sorted(split.values())) != usual or frozenset(split) != targets:
            yield case.finding(
                "nvlink.remote-uneven",
                "WARN",
                [gpu],
                f"{gpu.label} reaches {_spell(split)}",
                f"as most GPUs: {'/'.join(map(str, usual))} links to {', '.join(sorted(targets))}",
                "restart the fabric manager; compare firmware of GPU and switches",
            )


def _split(gpu: Gpu, own: set[str | None]) -> dict[str, int]:
    """Links to each switch; those to GPUs of the machine, by bus id, lead elsewhere for each GPU."""
    if gpu.peers:
        found: dict[str, int] = {}
        for peer in gpu.peers:
            if peer.kind == "switch":
                found[peer.target] = found.get(peer.target, 0) + peer.count
        return found
    return dict(Counter(x.remote for x in gpu.nvlinks or () if x.remote is not None and x.remote not in own))


def _spell(split: dict[str, int]) -> str:
    return ", ".join(f"{target} with {count}" for target, count in sorted(split.items()))


def check_errors(case: Case) -> Iterator[Finding]:
    """Error counters: worth knowing; from a few recoveries on a warning, never more."""
    for gpu in case.view.gpus:
        counted = [
            (x.index, name, n) for x in gpu.nvlinks or () for name, n in x.errors.items() if n and "rror" in name
        ]
        if not counted:
            continue
        most = max(n for _, name, n in counted if n)
        recovered = max((n for _, name, n in counted if "ecovery" in name or "eplay" in name), default=0)
        shown = ", ".join(f"link {i} {name} {n}" for i, name, n in counted[:4])
        yield case.finding(
            "nvlink.errors",
            "WARN" if recovered >= ERROR_WARN else "INFO",
            [gpu],
            f"{gpu.label}: {shown} (largest {most}), counted since the driver was loaded",
            "no new errors while a job runs",
            "compare the counters before and after a job; growing ones mean a bad link",
        )
