"""Rules for ``NCCL_TOPO_FILE``: what NCCL reads over without a word, or refuses.

The checks of `wsync.topo.checks` run on the file, too: a file with a GPU that has no NVLink gives NCCL such a GPU. Here
are the rules that need the document itself, with its lines, or something to compare it with.

Source: NCCL 2.30.7 ``src/graph/xml.cc`` and ``topo.cc``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from msgspec.structs import replace

from wsync.errors import ConfigError
from wsync.topo.checks import Case, run_checks
from wsync.topo.files import read_regular
from wsync.topo.findings import Finding, Severity, Subject, guide_link
from wsync.topo.lint_hca import select_devices
from wsync.topo.model import Machine
from wsync.topo.parse.nccl_xml import parse_system
from wsync.topo.parse.text import MAX_INPUT_BYTES, bus_id, decode
from wsync.topo.parse.xml_tree import Node, parse_xml
from wsync.topo.roots import find_roots

TAGS = frozenset(("system", "cpu", "pci", "gpu", "nvlink", "c2c", "pcilink", "nic", "net"))
GPU_CLASS = "0x03"
VIRTUAL_BUS = "ffff:"
"""Domain of bridges that authors of files make up; no host has it."""

NOT_OF_FILES = ("input.nothing-to-judge",)
"""Findings that a machine's description deserves and a part of one, which NCCL completes from sysfs, does not."""

LOUDER: dict[str, Severity] = {"pcie.uplink-slow": "WARN", "lint.class-missing": "INFO", "numa.unknown": "WARN"}
"""Severities in a file that someone wrote, where a check of the machine believes the author."""


@dataclass(frozen=True)
class TopologyFile:
    """A document and what is read from it, one machine for each host."""

    name: str
    root: Node
    machines: tuple[Machine, ...]

    @cached_property
    def devices(self) -> dict[str, list[Node]]:
        """``<pci>`` elements by bus id."""
        found: dict[str, list[Node]] = {}
        for node in self.root.walk():
            bus = bus_id(node.get("busid") or "") if node.tag == "pci" else None
            if bus is not None:
                found.setdefault(bus, []).append(node)
        return found

    def finding(
        self, finding_id: str, severity: Severity, devices: tuple[str, ...], evidence: str, expected: str, remedy: str
    ) -> Finding:
        """A finding of this file."""
        subject = Subject(devices=devices)
        text = f"{self.name}: {evidence}"
        return Finding(finding_id, severity, subject, text, expected, remedy, guide_link(finding_id))


def read_topology_file(path: Path) -> TopologyFile:
    """Read a ``<system>``.

    Raises:
        ConfigError: it cannot be read, is not XML, truncated, or the XML of something else.
    """
    text = decode(read_regular(path, MAX_INPUT_BYTES + 1), str(path))
    if text.lstrip()[:1] != "<":
        raise ConfigError(f"{path.name} is not XML", hint="an environment is linted with --env FILE")
    root = parse_xml(text, path.name)
    if root.tag != "system":
        raise ConfigError(f"{path.name} is XML of a <{root.tag}>, NCCL_TOPO_FILE needs a <system>")
    return TopologyFile(path.name, root, parse_system(root, path.name))


def lint_document(
    document: TopologyFile, machine: Machine | None, variables: Mapping[str, str], sysfs: Path | None
) -> tuple[Finding, ...]:
    """All rules on one file.

    Args:
        document: the file.
        machine: the host's own, or None.
        variables: of NCCL's environment, by name.
        sysfs: root of the host's sysfs, or None.
    """
    found = [f for m in document.machines for f in _checks(m)]
    for rule in (_version, _tags, _hosts, _duplicates, _targets, _masks):
        found += rule(document)
    if machine is not None:
        found += _against_machine(document, machine)
    if sysfs is not None:
        found += _against_sysfs(document, sysfs)
    if variables.get("NCCL_IB_HCA"):
        found += _against_hca(document, variables["NCCL_IB_HCA"])
    return tuple(found)


def _checks(machine: Machine) -> Iterator[Finding]:
    case = Case(machine)
    for finding in find_roots(case, run_checks(case)):
        if finding.id not in NOT_OF_FILES:
            yield replace(finding, severity=LOUDER.get(finding.id, finding.severity))


def _version(document: TopologyFile) -> Iterator[Finding]:
    version = document.root.get("version")
    if version != "1":
        yield document.finding(
            "lint.version",
            "CRIT",
            (),
            f'<system version="{version}">, line {document.root.line}',
            '<system version="1">',
            "NCCL refuses any other version",
        )


def _tags(document: TopologyFile) -> Iterator[Finding]:
    unknown = [n for n in document.root.walk() if n.tag not in TAGS]
    if unknown:
        names = ", ".join(f"<{n.tag}> in line {n.line}" for n in unknown[:4])
        yield document.finding(
            "lint.tag-unknown",
            "WARN",
            tuple(dict.fromkeys(n.tag for n in unknown)),
            f"{len(unknown)} elements that NCCL passes over: {names}",
            ", ".join(sorted(TAGS)),
            "correct the name: what stands inside is lost, too",
        )


def _hosts(document: TopologyFile) -> Iterator[Finding]:
    if len(document.machines) > 1:
        names = tuple(m.host or "?" for m in document.machines)
        yield document.finding(
            "lint.several-hosts",
            "WARN",
            names,
            f"{len(names)} hosts (host_hash {', '.join(names[:4])}) in one file",
            "one host: NCCL_TOPO_DUMP_FILE of an NVLink domain holds all, NCCL_TOPO_FILE may hold one",
            "keep the <cpu> elements of one host",
        )


def _duplicates(document: TopologyFile) -> Iterator[Finding]:
    """Bus ids of one host that two elements have; the parser knows those of GPUs and bridges."""
    told = {o.subject for m in document.machines for o in m.oddities if o.kind == "bus-id-twice"}
    for cpus in _by_host(document.root).values():
        lines: dict[str, list[int]] = {}
        for node in (n for cpu in cpus for n in cpu.walk() if n.tag == "pci"):
            lines.setdefault(bus_id(node.get("busid") or "") or "", []).append(node.line)
        for bus, at in lines.items():
            if bus and len(at) > 1 and bus not in told:
                yield document.finding(
                    "lint.bus-id-twice",
                    "WARN",
                    (bus,),
                    f"{bus} in lines {', '.join(map(str, at))}",
                    "each bus id once per host",
                    "NCCL puts both into the first; correct one",
                )


def _by_host(root: Node) -> dict[str | None, list[Node]]:
    found: dict[str | None, list[Node]] = {}
    for cpu in root.all("cpu"):
        found.setdefault(cpu.get("host_hash"), []).append(cpu)
    return found


def _targets(document: TopologyFile) -> Iterator[Finding]:
    """NVLinks between GPUs lead to GPUs of the file, and back."""
    for machine in document.machines:
        counts = {g.bus_id: {p.target: p.count for p in g.peers or () if p.kind == "gpu"} for g in machine.gpus}
        for bus, peers in counts.items():
            for target, count in peers.items():
                if target == bus or bus is None:
                    continue
                if target not in counts:
                    yield document.finding(
                        "lint.nvlink-target",
                        "WARN",
                        (bus,),
                        f"{count} NVLinks of {bus} lead to {target}, which is no GPU of the file",
                        "a GPU of the file, or the class of a switch",
                        "correct the target; NCCL drops these links",
                    )
                elif bus < target and counts[target].get(bus, 0) != count:
                    yield document.finding(
                        "lint.nvlink-uneven",
                        "WARN",
                        (bus, target),
                        f"{count} NVLinks from {bus} to {target}, {counts[target].get(bus, 0)} back",
                        "the same number",
                        "correct the count",
                    )


def _masks(document: TopologyFile) -> Iterator[Finding]:
    """Nodes without CPUs, which are memory (of Grace, or CXL) or a slip of the pen."""
    for cpu in document.root.all("cpu"):
        mask = cpu.get("affinity")
        if mask and not mask.strip("0,"):
            yield document.finding(
                "lint.affinity",
                "INFO",
                (f"NUMA node {cpu.get('numaid')}",),
                f'affinity "{mask}", line {cpu.line}, has no CPU',
                "a mask with CPUs, or none",
                "copy it from sysfs local_cpus",
            )


def _against_machine(document: TopologyFile, machine: Machine) -> Iterator[Finding]:
    host = {"GPU": {g.bus_id for g in machine.gpus}, "NIC": {n.bus_id for n in machine.nics}}
    file = {
        "GPU": {g.bus_id for m in document.machines for g in m.gpus},
        "NIC": {n.bus_id for m in document.machines for n in m.nics},
    }
    for kind, here in host.items():
        if None in here or not here:
            # Without all bus ids of the host nothing follows from one that is not among them.
            continue
        absent = sorted(b for b in file[kind] if b is not None and b not in here)
        if absent:
            yield _absent(document, kind, absent, f"the host has {kind}s at {_some(sorted(map(str, here)))}")
        missing = sorted(str(b) for b in here if b not in file[kind]) if file[kind] else []
        if missing:
            yield document.finding(
                "lint.device-missing",
                "WARN" if kind == "GPU" else "INFO",
                tuple(missing),
                f"{len(missing)} {kind}s of the host are not in the file: {_some(missing)}",
                f"all {len(here)} {kind}s",
                "NCCL adds them where sysfs says that they are; add them to the file",
            )
    names = {n.label for n in machine.nics}
    nets = [n.label for m in document.machines for n in m.nics if not n.label.startswith(("nic@", "net"))]
    unknown = [n for n in dict.fromkeys(nets) if n not in names]
    if unknown and names and not any(n.startswith(("NIC", "nic@", "NET/")) for n in names):
        yield document.finding(
            "lint.net-absent",
            "WARN",
            tuple(unknown),
            f"nets {_some(unknown)}: the host has {_some(sorted(names))}",
            "names of the host's devices",
            "correct the names, or renew the file after a driver renamed the devices",
        )


def _against_sysfs(document: TopologyFile, sysfs: Path) -> Iterator[Finding]:
    folder = sysfs / "bus" / "pci" / "devices"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", hint="--sysfs is the root, such as /sys")
    for kind in ("GPU", "NIC"):
        devices = [d for m in document.machines for d in (m.gpus if kind == "GPU" else m.nics)]
        buses = dict.fromkeys(d.bus_id for d in devices if d.bus_id and not d.bus_id.startswith(VIRTUAL_BUS))
        absent = [b for b in buses if not (folder / b).exists()]
        if absent:
            yield _absent(document, kind, absent, f"{folder} has {len(list(folder.iterdir()))} devices, not these")


def _absent(document: TopologyFile, kind: str, absent: list[str], evidence: str) -> Finding:
    return document.finding(
        "lint.bus-id-absent",
        "WARN",
        tuple(absent),
        f"{len(absent)} {kind}s of the file are not on the host: {_some(absent)}; {evidence}",
        "bus ids of this host",
        "NCCL drops them and believes its own detection; write a file for this kind of host",
    )


def _against_hca(document: TopologyFile, value: str) -> Iterator[Finding]:
    nets = list(dict.fromkeys(n.label for m in document.machines for n in m.nics if not n.label.startswith("nic@")))
    if not nets:
        return
    chosen = select_devices(value, nets)
    rest = [n for n in nets if n not in chosen]
    if rest:
        severity: Severity = "CRIT" if not chosen else "INFO"
        yield document.finding(
            "lint.net-not-selected",
            severity,
            tuple(rest),
            f"NCCL_IB_HCA={value} selects {len(chosen)} of {len(nets)} nets of the file, not {_some(rest)}",
            "the nets that the list selects",
            "bring file and list together",
        )


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
