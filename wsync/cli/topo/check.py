"""``wsync topo check``."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from wsync.cli.topo.exits import add_exit_arguments, counted_verdict, exit_of
from wsync.cli.topo.inputs import add_arguments, live_options, read_inputs
from wsync.cli.topo.judged import judge_or_none, status_of
from wsync.cli.topo.outputs import add_output_arguments, check_outputs, print_unjudged, write_outputs
from wsync.topo.model import Topology
from wsync.topo.report import Report, check_topology


def add_parser(commands: Any) -> None:
    """Add ``check``."""
    parser = commands.add_parser("check", help="a verdict, its reasons and remedies", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument(
        "--platform", metavar="NAME", help="expect this GPU model instead of the one that was recognised"
    )
    add_exit_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Print the report and return the verdict's exit status; what cannot be judged at all is UNKNOWN."""
    judged = judge_or_none(args, lambda: _judge(args), lambda e: print_unjudged(e, args, _host(args)))
    if judged is None:
        return exit_of("UNKNOWN", args.exit_style)
    topology, report = judged
    verdict = counted_verdict([f.severity for f in report.all_findings()], args.exit_style, args.fail_on)
    return status_of(args, verdict, write_outputs(report, topology, args, verdict))


def _host(args: argparse.Namespace) -> str | None:
    """Name of the machine that was to be judged, where it is this one."""
    return args.host or (None if live_options(args) is None else platform.node() or None)


def _judge(args: argparse.Namespace) -> tuple[Topology, Report]:
    check_outputs(args)
    topology = read_inputs(args.inputs, args.host, live_options(args))
    return topology, check_topology(topology, args.platform)
