"""``wsync topo golden save``, ``check`` and ``diff``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wsync.cli.output import EXIT_OK, check_writable, print_error, stdout_console, write_json
from wsync.cli.topo.exits import exit_of
from wsync.cli.topo.hosts import read_hosts
from wsync.cli.topo.inputs import add_arguments, read_inputs
from wsync.cli.topo.lines import print_findings, print_verdict
from wsync.errors import ConfigError, DigestError, FormatVersionError
from wsync.topo.findings import worst
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


def add_parser(commands: Any) -> None:
    """Add ``golden`` with its subcommands."""
    parser = commands.add_parser("golden", help="keep how a machine looks when it is right", allow_abbrev=False)
    parts = parser.add_subparsers(dest="golden_command", required=True, metavar="COMMAND")
    save = parts.add_parser("save", help="write a golden file from machines that are alike", allow_abbrev=False)
    add_arguments(save)
    save.add_argument("--output", metavar="FILE", required=True, help="the file to write")
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
        sub.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the report as JSON (-: to stdout)")


def run_save(args: argparse.Namespace) -> int:
    """Write the file.

    Raises:
        ConfigError: inputs that are not whole, or machines that differ.
    """
    check_writable(args.output, "--output")
    golden = make_golden(read_inputs(args.inputs, args.host).machines)
    save_golden(golden, args.output)
    stdout_console().print(golden.fingerprint, markup=False, highlight=False)
    return EXIT_OK


def run_check(args: argparse.Namespace) -> int:
    """Print what differs from the golden file and return the verdict's exit status."""
    check_writable(args.json, "--json")
    try:
        report = check_golden(load_golden(args.golden), read_hosts(args.inputs))
    except (ConfigError, DigestError, FormatVersionError) as e:
        print_error(e)
        return exit_of("UNKNOWN")
    return _finish(args, report, f"{len(report.hosts)} hosts against {report.fingerprint}")


def run_diff(args: argparse.Namespace) -> int:
    """Print the differences of B from A and return their verdict's exit status."""
    check_writable(args.json, "--json")
    try:
        (a, name_a), (b, name_b) = _side(args.a), _side(args.b)
    except (ConfigError, DigestError, FormatVersionError) as e:
        print_error(e)
        return exit_of("UNKNOWN")
    findings = tuple(findings_of(name_b, a.facts, b.facts, "host.golden-differs", name_a))
    report = GoldenReport(worst(findings), a.fingerprint, {name_b: b.fingerprint}, findings)
    return _finish(args, report, f"{name_a} {a.fingerprint}, {name_b} {b.fingerprint}")


def _finish(args: argparse.Namespace, report: GoldenReport, text: str) -> int:
    if args.json:
        write_json(report, args.json)
    if args.json != "-":
        print_verdict(report.verdict, text)
        print_findings(report.findings)
    return exit_of(report.verdict)


def _side(item: str) -> tuple[Golden, str]:
    if is_golden(item):
        return load_golden(item), Path(item).name
    machines = read_hosts([item])
    return make_golden(machines), name_of(machines[0])
