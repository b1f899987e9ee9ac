"""``wsync topo check``."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.output import check_writable, print_error, write_json
from wsync.cli.topo.exits import exit_of
from wsync.cli.topo.inputs import add_arguments, live_options, read_inputs
from wsync.cli.topo.table import print_report
from wsync.errors import ConfigError
from wsync.topo.report import Report, check_topology


def add_parser(commands: Any) -> None:
    """Add ``check``."""
    parser = commands.add_parser("check", help="a verdict, its reasons and remedies", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument(
        "--platform", metavar="NAME", help="expect this GPU model instead of the one that was recognised"
    )
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the report as JSON (-: to stdout)")
    parser.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Print the report and return the verdict's exit status; what cannot be judged at all is UNKNOWN."""
    check_writable(args.json, "--json")
    try:
        report: Report = check_topology(read_inputs(args.inputs, args.host, live_options(args)), args.platform)
    except ConfigError as e:
        print_error(e)
        return exit_of("UNKNOWN")
    if args.json:
        write_json(report, args.json)
    if args.json != "-":
        print_report(report)
    return exit_of(report.verdict)
