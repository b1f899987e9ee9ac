"""Findings for people, a few lines each: for commands that say little, and for logs."""

from __future__ import annotations

from collections.abc import Iterable

from wsync.cli.output import printable, stdout_console
from wsync.cli.topo.table import STYLES
from wsync.topo.findings import Finding, Verdict
from wsync.topo.render.summary import where


def say(text: str) -> None:
    """One line as it is: no markup, no wrapping, control characters spelt out."""
    stdout_console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def print_verdict(verdict: Verdict, text: str) -> None:
    """``WARN 2 files``."""
    from rich.text import Text

    stdout_console().print(Text.assemble((verdict, STYLES[verdict]), " ", printable(text)), soft_wrap=True)


def print_findings(findings: Iterable[Finding]) -> None:
    """Severity, name and subject; then what was seen, what was expected, what to do."""
    from rich.text import Text

    console = stdout_console()
    for finding in findings:
        subject = where(finding)
        host = finding.subject.host
        head = [f"{host}: " if host else "", finding.id, f"  {subject}" if subject else ""]
        console.print(
            Text.assemble((f"{finding.severity:8}", STYLES[finding.severity]), *map(printable, head)), soft_wrap=True
        )
        for name, text in (("", finding.evidence), ("expected: ", finding.expected), ("do: ", finding.remedy)):
            if text:
                console.print(f"         {name}{printable(text)}", markup=False, highlight=False, soft_wrap=True)
