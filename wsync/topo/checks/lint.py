"""Topology files and NCCL's environment: what was written by hand and is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from wsync.topo.checks.base import Case
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import HcaList, Oddity

ODDITIES: dict[str, tuple[str, Severity, str, str]] = {
    "nvlink-self": ("lint.nvlink-self", "CRIT", "links to other GPUs or to switches", "write the peer's bus id"),
    "speed-unknown": ("lint.speed-unknown", "WARN", "32.0 GT/s PCIe or 16 GT/s", "NCCL takes any other text for Gen3"),
    "speed-empty": ("lint.speed-empty", "INFO", "a speed", "NCCL takes it for Gen3; write the real speed and width"),
    "class-missing": ("lint.class-missing", "INFO", "a class", "NCCL asks sysfs; what they are is not known here"),
    "bus-id-twice": ("lint.bus-id-twice", "WARN", "each bus id once per host", "remove one of the two"),
    "bus-id-malformed": ("lint.bus-id-malformed", "WARN", "dddd:bb:dd.f", "correct it"),
    "affinity-malformed": ("lint.affinity", "WARN", "hexadecimal groups of 8 digits", "copy it from sysfs local_cpus"),
    "nvlink-malformed": ("lint.nvlink-malformed", "WARN", "a target and a count", "correct it"),
    "graph-malformed": ("lint.graph-malformed", "WARN", "numbers", "dump the graph again"),
    "numa-unknown": ("numa.unknown", "WARN", "a NUMA node", "in a VM, expose the NUMA nodes, or write them by hand"),
    "sources-disagree": ("sources.disagree", "WARN", "the same GPUs in all inputs", "record the inputs at one time"),
}  # fmt: skip
"""Kinds of `Oddity`: finding, severity, what is expected, what to do."""


def check_oddities(case: Case) -> Iterator[Finding]:
    """What parsers read over."""
    kinds = dict.fromkeys(o.kind for o in case.machine.oddities)
    for kind in kinds:
        if kind not in ODDITIES:
            continue
        finding_id, severity, expected, remedy = ODDITIES[kind]
        found = [o for o in case.machine.oddities if o.kind == kind]
        by_bus = {g.bus_id: g for g in case.view.gpus if g.bus_id is not None}
        subjects = [by_bus.get(o.subject, o.subject) for o in found if o.subject != "host"]
        yield case.finding(finding_id, severity, subjects, _spell(found), expected, remedy)


def _spell(found: list[Oddity]) -> str:
    texts = list(dict.fromkeys(o.text for o in found))
    shown = "; ".join(texts[:3])
    more = f" ({len(found)} times)" if len(found) > len(texts[:3]) else ""
    return f"{shown}{more} in {found[0].source}"


def check_masks(case: Case) -> Iterator[Finding]:
    """CPU masks of a file are of one length, and no CPU is in two of them."""
    masks = {n.index: n.mask for n in case.machine.numa_nodes if n.mask}
    lengths = Counter(len(m) for m in masks.values())
    if len(lengths) > 1:
        usual = lengths.most_common(1)[0][0]
        for node, mask in masks.items():
            if len(mask) != usual:
                group = next((g for g in mask.split(",") if len(g) != 8), mask)
                digits = f'group "{group}" has {len(group)} digits'
                yield case.finding(
                    "lint.affinity",
                    "WARN",
                    [f"NUMA node {node}"],
                    f'affinity "{mask}": {digits}, in all {len(mask)} characters of {usual}',
                    "groups of 8 hexadecimal digits",
                    "copy it from sysfs local_cpus; the CPUs at its end are lost",
                )
    values = {node: _value(mask) for node, mask in masks.items()}
    nodes = [n for n, v in values.items() if v is not None]
    for i, a in enumerate(nodes):
        for b in nodes[i + 1 :]:
            if (values[a] or 0) & (values[b] or 0):
                yield case.finding(
                    "lint.affinity",
                    "WARN",
                    [f"NUMA node {a}", f"NUMA node {b}"],
                    f"the affinities of nodes {a} and {b} share CPUs",
                    "disjoint masks",
                    "copy them from sysfs local_cpus",
                )


def _value(mask: str) -> int | None:
    try:
        return int(mask.replace(",", ""), 16)
    except ValueError:
        return None


def check_hca(case: Case) -> Iterator[Finding]:
    """``NCCL_IB_HCA`` names each device once, and devices that exist."""
    for hca in case.machine.hca_lists:
        devices = [e.lstrip("^=").partition(":")[0] for e in hca.entries]
        twice = [name for name, n in Counter(e.lstrip("^=") for e in hca.entries).items() if n > 1]
        if twice:
            yield case.finding(
                "lint.hca-twice",
                "WARN",
                [hca.name, *twice] if hca.name else twice,
                f"{hca.name + ': ' if hca.name else ''}{', '.join(twice)} is listed twice{_omitted(case, hca)}",
                "each device once",
                "correct the list",
            )
        known = {n.label for n in case.view.nics if not n.label.startswith(("nic@", "NIC", "NET/"))}
        absent = [d for d in dict.fromkeys(devices) if known and not any(k.startswith(d) for k in known)]
        if absent and not hca.name:
            yield case.finding(
                "lint.hca-absent",
                "WARN",
                absent,
                f"NCCL_IB_HCA names {', '.join(absent)}: no such device",
                "devices of this machine",
                "correct the list",
            )


def _omitted(case: Case, hca: HcaList) -> str:
    """What a list that is otherwise the same has in place of the second mention."""
    mine = set(hca.entries)
    for other in case.machine.hca_lists:
        extra = set(other.entries) - mine
        if (
            other is not hca
            and mine < set(other.entries)
            and len(extra) == 1
            and len(other.entries) == len(hca.entries)
        ):
            return f"; {other.name} has {extra.pop()} in its place"
    return ""
