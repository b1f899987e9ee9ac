"""The report for people: a line per machine, a table of findings with reasons and remedies."""

from __future__ import annotations

from wsync.cli.output import stdout_console
from wsync.topo.findings import Finding
from wsync.topo.report import MachineReport, Report

STYLES = {"OK": "green", "INFO": "cyan", "UNKNOWN": "magenta", "WARN": "yellow", "CRIT": "bold red"}


def print_report(report: Report) -> None:
    """Print all machines, then what concerns several."""
    from rich.text import Text

    console = stdout_console()
    for machine in report.machines:
        head = Text.assemble((machine.verdict, STYLES[machine.verdict]), " ", describe(machine))
        console.print(head, soft_wrap=True)
        if machine.findings:
            _print_table(machine.findings)
    if report.findings:
        console.print("between hosts", markup=False)
        _print_table(report.findings)


def describe(machine: MachineReport) -> str:
    """One line: host, size, platform and wiring."""
    wiring = {"switch": "NVSwitch", "mesh": "NVLink mesh", "bridge": "NVLink bridges", "none": "no NVLink"}
    parts = [f"{machine.num_gpus} GPUs", f"{machine.num_nics} NICs"]
    if machine.platform != "unknown":
        parts.append(machine.platform)
    if machine.joined in wiring:
        links = f", {machine.links} links each" if machine.links and machine.joined in ("switch", "mesh") else ""
        parts.append(wiring[machine.joined] + links)
    if not machine.complete:
        parts.append("input incomplete")
    return f"{machine.host or 'this machine'}: {', '.join(parts)}"


def _print_table(findings: tuple[Finding, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("finding", no_wrap=True)
    for name in ("where", "seen", "expected", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.severity, STYLES[finding.severity]),
            Text(finding.id),
            Text(where(finding)),
            Text(finding.evidence + _symptoms(finding)),
            Text(finding.expected),
            Text(finding.remedy),
        )
    stdout_console().print(table)


def where(finding: Finding) -> str:
    """``GPU1 (0009:06:00.0, rank 5)``; many devices are counted."""
    subject = finding.subject
    devices = list(subject.devices[:4]) + ([f"{len(subject.devices) - 4} more"] if len(subject.devices) > 4 else [])
    text = ", ".join(devices)
    if len(subject.devices) == 1:
        facts = [b for b in subject.bus_ids if b not in subject.devices] + [f"rank {r}" for r in subject.ranks]
        text += f" ({', '.join(facts)})" if facts else ""
    return text


def _symptoms(finding: Finding) -> str:
    if not finding.symptoms:
        return ""
    return "; this explains " + ", ".join(dict.fromkeys(f.id for f in finding.symptoms))
