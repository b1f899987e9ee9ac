"""``wsync doctor``."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from wsync import __version__
from wsync.cli.output import EXIT_FAILED, EXIT_OK, stdout_console, write_json
from wsync.cli.probes import BROKEN, FOUND, MISSING, PROBES, Finding

FORMAT_VERSION = 1
_STYLES = {FOUND: "green", MISSING: "yellow", BROKEN: "red"}


class Report(msgspec.Struct, frozen=True):
    """What ``wsync doctor --json`` writes."""

    format_version: int
    wsync: str
    ok: bool
    findings: list[Finding]


def add_parser(commands: Any) -> None:
    """Add ``doctor``."""
    parser = commands.add_parser(
        "doctor", help="what this machine has, what is missing for which feature, how to get it", allow_abbrev=False
    )
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the report as JSON (-: to stdout)")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Print the report; 1 if something that wsync cannot do without is missing."""
    report = examine()
    if args.json:
        write_json(report, args.json)
    if args.json != "-":
        _print(report)
    return EXIT_OK if report.ok else EXIT_FAILED


def examine() -> Report:
    """Run all probes, several at a time."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        findings = list(pool.map(lambda probe: probe(), PROBES))
    ok = all(finding.status == FOUND for finding in findings if finding.required)
    return Report(FORMAT_VERSION, __version__, ok, findings)


def _print(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="wsync doctor", title_justify="left")
    for name in ("what", "status", "version"):
        table.add_column(name, no_wrap=True)
    for name in ("detail", "needed for", "how to get it"):
        table.add_column(name, overflow="fold")
    for finding in report.findings:
        status = Text(finding.status, _STYLES[finding.status])
        get_it = "" if finding.status == FOUND and finding.required else finding.get_it
        table.add_row(
            finding.name, status, finding.version or "", Text(finding.detail), finding.needed_for, Text(get_it)
        )
    console = stdout_console()
    console.print(table)
    if not report.ok:
        lacking = ", ".join(f.name for f in report.findings if f.required and f.status != FOUND)
        console.print(f"wsync does not work here: {lacking}", style="red", markup=False)
