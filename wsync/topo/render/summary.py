"""What every output says of a report: names of hosts, numbers of findings, the first thing to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from wsync.topo.findings import SEVERITY_RANK, Finding, Severity, Verdict
from wsync.topo.report import Report

SEVERITIES: tuple[Severity, ...] = ("CRIT", "WARN", "UNKNOWN", "INFO")
"""The worst first."""


def host_names(report: Report) -> list[str]:
    """A name for each machine, no two equal: that of its host, else its number; empty for a single nameless machine."""
    hosts = [m.host for m in report.machines]
    if hosts == [None]:
        return [""]
    return distinct(host or f"machine {i}" for i, host in enumerate(hosts, 1))


def distinct(names: Iterable[str]) -> list[str]:
    """Names of which no two are equal: the second ``a`` becomes ``a #2``, unless another one is called so."""
    found = list(names)
    used = set(found)
    first: set[str] = set()
    for i, name in enumerate(found):
        number = 2
        while found[i] in first:
            if f"{name} #{number}" not in used:
                found[i] = f"{name} #{number}"
            number += 1
        first.add(found[i])
        used.add(found[i])
    return found


def count_findings(findings: list[Finding] | tuple[Finding, ...]) -> dict[Severity, int]:
    """Number of findings of each severity; symptoms are not counted, their cause is."""
    found = Counter(f.severity for f in findings)
    return {severity: found[severity] for severity in SEVERITIES}


def root_findings(report: Report) -> list[Finding]:
    """Findings of all hosts by severity, and of equal ones those that explain most first.

    What only says that a host differs from others comes after what is wrong with that host.
    """
    return sorted(
        report.all_findings(), key=lambda f: (-SEVERITY_RANK[f.severity], f.id == "host.outlier", -len(f.symptoms))
    )


def verdict_from(severities: Iterable[Severity], least: Severity) -> Verdict:
    """The verdict where only findings from ``least`` on count; one of ``INFO`` that counts is a WARN.

    UNKNOWN always counts where no worse finding does: that something could not be judged is no matter of degree.
    """
    found = set(severities)
    counted = {s for s in found if SEVERITY_RANK[s] >= SEVERITY_RANK[least]}
    if "CRIT" in counted:
        return "CRIT"
    if "WARN" in counted:
        return "WARN"
    if "UNKNOWN" in found:
        return "UNKNOWN"
    return "WARN" if "INFO" in counted else "OK"


def plural(number: int, name: str) -> str:
    """``1 GPU``, ``8 GPUs``."""
    return f"{number} {name}" + ("" if number == 1 else "s")


def spell_counts(counts: dict[Severity, int]) -> str:
    """``2 CRIT, 1 INFO``; ``no findings``."""
    return ", ".join(f"{n} {severity}" for severity, n in counts.items() if n) or "no findings"


def where(finding: Finding) -> str:
    """``GPU1 (0009:06:00.0, rank 5)``; many devices are counted."""
    subject = finding.subject
    devices = list(subject.devices[:4]) + ([f"{len(subject.devices) - 4} more"] if len(subject.devices) > 4 else [])
    text = ", ".join(devices)
    if len(subject.devices) == 1:
        facts = [b for b in subject.bus_ids if b not in subject.devices] + [f"rank {r}" for r in subject.ranks]
        text += f" ({', '.join(facts)})" if facts else ""
    return text
