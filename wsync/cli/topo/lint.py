"""``wsync topo lint``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from wsync.cli.topo.inputs import read_inputs
from wsync.cli.topo.judged import add_judging_arguments, run_judged
from wsync.cli.topo.lines import print_findings, print_verdict
from wsync.errors import ConfigError
from wsync.topo.files import read_regular
from wsync.topo.findings import worst
from wsync.topo.lint import LintReport, lint
from wsync.topo.lint_env import Assignment, assignments_of, lint_tables, names_of, parse_environment
from wsync.topo.model import Machine
from wsync.topo.parse.text import MAX_INPUT_BYTES
from wsync.topo.render.summary import plural


def add_parser(commands: Any) -> None:
    """Add ``lint``."""
    parser = commands.add_parser("lint", help="lint NCCL_TOPO_FILE and NCCL's environment", allow_abbrev=False)
    parser.add_argument("files", nargs="*", metavar="FILE", help="XML for NCCL_TOPO_FILE")
    parser.add_argument(
        "--env",
        metavar="FILE",
        help="output of env, a script, /etc/nccl.conf, /proc/PID/environ or a table with a column NCCL_IB_HCA "
        "(-: stdin). Without FILE and without --env the environment of this process is linted",
    )
    parser.add_argument(
        "--machine",
        metavar="FILE|FOLDER",
        action="append",
        default=[],
        help="what the host's own tools say of it: bus ids and devices that it lacks are findings; may be repeated",
    )
    parser.add_argument("--sysfs", metavar="DIR", help="root of this host's sysfs (/sys), to look for the bus ids")
    add_judging_arguments(parser)
    parser.set_defaults(run=run_lint)


def run_lint(args: argparse.Namespace) -> int:
    """Print the findings and return the verdict's exit status; what cannot be read is UNKNOWN."""
    return run_judged(args, lambda: _lint(args), lambda report: [f.severity for f in report.findings], _print)


def _print(report: LintReport) -> None:
    print_verdict(report.verdict, ", ".join(report.inputs))
    print_findings(report.findings)


def _lint(args: argparse.Namespace) -> LintReport:
    machine = _read_machine(args.machine)
    sysfs = Path(args.sysfs) if args.sysfs else None
    if args.env is None and args.files:
        return lint(args.files, None, machine, sysfs=sysfs)
    if args.env is None:
        variables = assignments_of(os.environ)
        name = "environment of this process"
        return _counted(lint((), variables, machine, name, sysfs, follow=True), name, variables)
    data, name = _read_bytes(args.env)
    variables = parse_environment(data, name)
    tables = lint_tables(data, machine, name)
    report = lint(args.files, variables, machine, name, sysfs)
    if not tables:
        return _counted(report, name, variables)
    findings = (*tables, *report.findings)
    return LintReport(worst(findings), report.inputs, findings)


def _counted(report: LintReport, name: str, variables: tuple[Assignment, ...]) -> LintReport:
    """How many variables an input has is said once, not in each finding."""
    shown = f"{name} ({plural(len(names_of(variables)), 'variable')} of NCCL)"
    return LintReport(report.verdict, tuple(shown if i == name else i for i in report.inputs), report.findings)


def _read_machine(inputs: list[str]) -> Machine | None:
    if not inputs:
        return None
    machines = read_inputs(inputs, None).machines
    if len(machines) != 1:
        raise ConfigError(f"--machine describes {len(machines)} hosts, lint compares with 1")
    for gap in machines[0].gaps:
        if gap.fatal:
            raise ConfigError(gap.what)
    return machines[0]


def _read_bytes(target: str) -> tuple[bytes, str]:
    if target == "-":
        return sys.stdin.buffer.read(MAX_INPUT_BYTES + 1), "stdin"
    return read_regular(target, MAX_INPUT_BYTES + 1), Path(target).name
