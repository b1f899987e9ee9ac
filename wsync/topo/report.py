"""From a topology to a verdict: findings of each machine, grouped by cause, and what hosts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from wsync.topo.checks import Case, run_checks
from wsync.topo.findings import SEVERITY_RANK, Finding, Subject, Verdict, guide_link, worst
from wsync.topo.model import Machine, Topology
from wsync.topo.nics import assign_nics, compute_nics
from wsync.topo.parse import read_files
from wsync.topo.platforms import profile_named
from wsync.topo.roots import find_roots

REPORT_VERSION = 1
"""Version of ``wsync topo check --json``."""


class MachineReport(msgspec.Struct, frozen=True):
    """The verdict on one host.

    Attributes:
        host: its name, or None.
        verdict: of its findings.
        complete: nothing that an input announced is missing.
        platform: name of the profile that was applied.
        joined: ``"switch"``, ``"mesh"``, ``"bridge"``, ``"none"`` or ``"unknown"``.
        links: NVLinks that each GPU should have, if known.
        num_gpus, num_nics: in sight.
        islands: indices of GPUs that NVLink joins.
        compute_nics: NICs that a job should use.
        nic_of_gpu: the NIC that each GPU should use.
        findings: worst first, grouped by cause.
        sources: inputs.
    """

    host: str | None
    verdict: Verdict
    complete: bool
    platform: str
    joined: str
    links: int | None
    num_gpus: int
    num_nics: int
    islands: tuple[tuple[int, ...], ...]
    compute_nics: tuple[str, ...]
    nic_of_gpu: dict[str, str]
    findings: tuple[Finding, ...]
    sources: tuple[str, ...]


class Report(msgspec.Struct, frozen=True):
    """The verdict on all hosts; ``findings`` are those of no single one."""

    verdict: Verdict
    machines: tuple[MachineReport, ...]
    findings: tuple[Finding, ...] = ()
    format_version: int = REPORT_VERSION

    def all_findings(self) -> list[Finding]:
        """Findings of all hosts and those between them, the worst first."""
        found = [*self.findings, *(f for m in self.machines for f in m.findings)]
        return sorted(found, key=lambda f: -SEVERITY_RANK[f.severity])


def check_machine(machine: Machine, platform: str | None = None) -> MachineReport:
    """Judge one machine.

    Args:
        machine: what was read.
        platform: a profile's name, where the automatic choice should not be used.

    Raises:
        ConfigError: no such platform.
    """
    case = Case(machine, profile_named(platform) if platform else None)
    findings = tuple(find_roots(case, run_checks(case)))
    return MachineReport(
        host=machine.host,
        verdict=worst(findings),
        complete=not machine.gaps,
        platform=case.profile.name,
        joined=case.shape.joined,
        links=case.links,
        num_gpus=len(machine.gpus),
        num_nics=len(machine.nics),
        islands=case.view.islands,
        compute_nics=tuple(n.label for n in compute_nics(case.view, case.coherent)),
        nic_of_gpu={f"GPU{i}": nic for i, nic in assign_nics(case.view, case.coherent).items()},
        findings=findings,
        sources=machine.sources,
    )


def check_topology(topology: Topology, platform: str | None = None) -> Report:
    """Judge all machines, and name the hosts that differ from the majority."""
    machines = tuple(check_machine(m, platform) for m in topology.machines)
    between = tuple(_outliers(machines)) if machines else (_NOTHING,)
    everything = [f for m in machines for f in m.findings] + list(between)
    return Report(worst(everything), machines, between)


def check_files(paths: Sequence[str | Path], platform: str | None = None, host: str | None = None) -> Report:
    """Read the files of one machine and judge it; a file that cannot be used makes the verdict UNKNOWN."""
    return check_topology(read_files(paths, host), platform)


_NOTHING = Finding(
    "input.nothing-to-judge",
    "UNKNOWN",
    Subject(),
    "the inputs hold no machine",
    "at least one",
    "record the topology again",
    guide_link("input.nothing-to-judge"),
)


def _outliers(machines: Sequence[MachineReport]) -> list[Finding]:
    """Hosts with faults among a majority without: the node is the cause, not the fleet."""
    bad = [m for m in machines if m.verdict in ("WARN", "CRIT")]
    if len(machines) < 3 or not bad or 2 * len(bad) >= len(machines):
        return []
    found = []
    for machine in bad:
        finding = Finding(
            "host.outlier",
            "WARN",
            Subject(machine.host),
            f"{machine.host or 'a host'} is {machine.verdict}; {len(machines) - len(bad)} of {len(machines)} are not",
            "hosts of one kind that agree",
            "drain this host; the others show what is possible",
            guide_link("host.outlier"),
        )
        found.append(replace(finding, symptoms=tuple(f for f in machine.findings if f.severity in ("WARN", "CRIT"))))
    return found
