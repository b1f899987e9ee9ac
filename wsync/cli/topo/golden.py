"""``wsync topo golden save``, ``check`` and ``diff``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wsync.cli.output import EXIT_OK, check_writable, stdout_console
from wsync.cli.topo.hosts import read_hosts
from wsync.cli.topo.inputs import add_arguments, live_options, read_inputs
from wsync.cli.topo.judged import add_judging_arguments, run_judged
from wsync.cli.topo.lines import print_findings, print_verdict
from wsync.topo.findings import Severity, worst
from wsync.topo.golden import (
    Golden,
    GoldenReport,
    check_golden,
    findings_of,
    is_golden,
    load_golden,
    make_golden,
    name_of,
    save_golden,
)
from wsync.topo.render.summary import plural


def add_parser(commands: Any) -> None:
    """Add ``golden`` with its subcommands."""
    parser = commands.add_parser("golden", help="keep how a machine looks when it is right", allow_abbrev=False)
    parts = parser.add_subparsers(dest="golden_command", required=True, metavar="COMMAND")
    save = parts.add_parser("save", help="write a golden file from machines that are alike", allow_abbrev=False)
    add_arguments(save)
    save.add_argument("-o", "--output", metavar="FILE", required=True, help="the file to write")
    save.set_defaults(run=run_save)
    check = parts.add_parser("check", help="compare hosts with a golden file", allow_abbrev=False)
    check.add_argument("golden", metavar="GOLDEN", help="what `wsync topo golden save` wrote")
    check.add_argument("inputs", nargs="+", metavar="FILE|FOLDER", help="of one host each")
    check.set_defaults(run=run_check)
    diff = parts.add_parser("diff", help="say how two golden files or hosts differ", allow_abbrev=False)
    diff.add_argument("a", metavar="A", help="golden file, file or folder of a host")
    diff.add_argument("b", metavar="B", help="the same")
    diff.set_defaults(run=run_diff)
    for sub in (check, diff):
        add_judging_arguments(sub)


def run_save(args: argparse.Namespace) -> int:
    """Write the file.

    Raises:
        ConfigError: inputs that are not whole, or machines that differ.
    """
    check_writable(args.output, "--output")
    golden = make_golden(read_inputs(args.inputs, args.host, live_options(args)).machines)
    save_golden(golden, args.output)
    stdout_console().print(golden.fingerprint, markup=False, highlight=False)
    return EXIT_OK


def run_check(args: argparse.Namespace) -> int:
    """Print what differs from the golden file and return the verdict's exit status."""

    def show(report: GoldenReport) -> None:
        _print(report, f"{plural(len(report.hosts), 'host')} against {report.fingerprint}")

    return run_judged(args, lambda: check_golden(load_golden(args.golden), read_hosts(args.inputs)), _severities, show)


def run_diff(args: argparse.Namespace) -> int:
    """Print the differences of B from A and return their verdict's exit status."""
    sides: list[str] = []

    def judge() -> GoldenReport:
        (a, name_a), (b, name_b) = _side(args.a), _side(args.b)
        sides.append(f"{name_a} {a.fingerprint}, {name_b} {b.fingerprint}")
        findings = tuple(findings_of(name_b, a.facts, b.facts, "host.golden-differs", name_a))
        return GoldenReport(worst(findings), a.fingerprint, {name_b: b.fingerprint}, findings)

    return run_judged(args, judge, _severities, lambda report: _print(report, *sides))


def _severities(report: GoldenReport) -> list[Severity]:
    return [f.severity for f in report.findings]


def _print(report: GoldenReport, text: str) -> None:
    print_verdict(report.verdict, text)
    print_findings(report.findings)


def _side(item: str) -> tuple[Golden, str]:
    if is_golden(item):
        return load_golden(item), Path(item).name
    machines = read_hosts([item])
    return make_golden(machines), name_of(machines[0])
