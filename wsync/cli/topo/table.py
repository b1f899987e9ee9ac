"""The report for people: counts, a line per machine, a table of causes with what they explain, reasons and remedies."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.cli.output import printable, stdout_console
from wsync.topo.findings import Finding
from wsync.topo.render.summary import count_findings, plural, root_findings, spell_counts, where
from wsync.topo.report import MachineReport, Report

STYLES = {"OK": "green", "INFO": "cyan", "UNKNOWN": "magenta", "WARN": "yellow", "CRIT": "bold red"}
_MAX_SYMPTOMS = 6

__all__ = ["STYLES", "describe", "describe_all", "print_report", "sorted_by_cause", "symptom_rows", "where"]


def print_report(report: Report, quiet: bool = False) -> None:
    """Print what concerns several machines, then each of them.

    Args:
        report: what was found.
        quiet: only machines and findings above INFO, so that a healthy report prints nothing.
    """
    from rich.text import Text

    console = stdout_console()
    if len(report.machines) > 1 and not (quiet and report.verdict == "OK"):
        style = STYLES[report.verdict]
        console.print(Text.assemble((report.verdict, style), " ", printable(describe_all(report))), soft_wrap=True)
    if report.findings:
        _print_table(report.findings, symptoms=False)
    for machine in report.machines:
        if quiet and machine.verdict == "OK":
            continue
        head = Text.assemble((machine.verdict, STYLES[machine.verdict]), " ", printable(describe(machine)))
        console.print(head, soft_wrap=True)
        findings = [f for f in machine.findings if not quiet or f.severity != "INFO"]
        if findings:
            _print_table(sorted_by_cause(findings))


def sorted_by_cause(findings: Sequence[Finding]) -> list[Finding]:
    """As `root_findings`, of one machine."""
    return root_findings(Report("OK", (), tuple(findings)))


def describe_all(report: Report) -> str:
    """One line: how many machines, how many of them not OK, and the findings of all."""
    bad = sum(m.verdict != "OK" for m in report.machines)
    counts = spell_counts(count_findings([f for m in report.machines for f in m.findings]))
    return f"{len(report.machines)} machines, {bad} not OK: {counts}"


def describe(machine: MachineReport) -> str:
    """One line: host, size, platform, wiring and numbers of findings."""
    wiring = {"switch": "NVSwitch", "mesh": "NVLink mesh", "bridge": "NVLink bridges", "none": "no NVLink"}
    parts = [plural(machine.num_gpus, "GPU"), plural(machine.num_nics, "NIC")]
    if machine.platform != "unknown":
        parts.append(machine.platform)
    if machine.joined in wiring:
        links = f", {machine.links} links each" if machine.links and machine.joined in ("switch", "mesh") else ""
        parts.append(wiring[machine.joined] + links)
    if not machine.complete:
        parts.append("input incomplete")
    counts = spell_counts(count_findings(machine.findings))
    return f"{machine.host or 'this machine'}: {', '.join(parts)}; {counts}"


def _print_table(findings: Sequence[Finding], symptoms: bool = True) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for name in ("where", "seen", "expected", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.severity, STYLES[finding.severity]),
            *(Text(printable(t)) for t in _cells(finding)),
        )
        if symptoms:
            for cells in symptom_rows(finding):
                table.add_row(Text(""), *(Text(printable(cell), "dim") for cell in cells))
    stdout_console().print(table)


def _cells(finding: Finding) -> tuple[str, ...]:
    return finding.id, where(finding), finding.evidence, finding.expected, finding.remedy


def symptom_rows(finding: Finding) -> list[tuple[str, str, str]]:
    """Id, place and evidence of what a finding explains; long lists have an end."""
    found = finding.symptoms
    rows = [(f"└ {f.id}", where(f), f.evidence) for f in found[:_MAX_SYMPTOMS]]
    if len(found) > _MAX_SYMPTOMS:
        rows.append((f"└ {len(found) - _MAX_SYMPTOMS} more", "", "explained by the same cause"))
    return rows
