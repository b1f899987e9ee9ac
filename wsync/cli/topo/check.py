"""``wsync topo check``."""

from __future__ import annotations

import argparse
import traceback
from typing import Any

from wsync.cli.topo.exits import add_exit_arguments, counted_verdict, exit_of
from wsync.cli.topo.inputs import add_arguments, live_options, read_inputs
from wsync.cli.topo.outputs import add_output_arguments, check_outputs, print_unjudged, write_outputs
from wsync.errors import ConfigError
from wsync.topo.report import check_topology


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
    try:
        check_outputs(args)
        topology = read_inputs(args.inputs, args.host, live_options(args))
        report = check_topology(topology, args.platform)
    except ConfigError as e:
        print_unjudged(e, args)
        return exit_of("UNKNOWN", args.exit_style)
    except Exception as e:
        # A mistake of ours says nothing of the machine: Python's status 1 would read WARN, and drain it in a prolog.
        if args.debug:
            raise
        traceback.print_exc()
        print_unjudged(ConfigError(f"wsync failed: {type(e).__name__}: {e}", hint="please report it"), args)
        return exit_of("UNKNOWN", args.exit_style)
    verdict = counted_verdict(report, args.exit_style, args.fail_on)
    written = write_outputs(report, topology, args, verdict)
    # A fault stays one where a file cannot be written; that all is well is not known by who reads the file.
    return exit_of(verdict if written or verdict != "OK" else "UNKNOWN", args.exit_style)
