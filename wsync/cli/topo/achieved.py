"""``wsync topo achieved``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wsync.cli.topo.judged import add_judging_arguments, run_judged
from wsync.cli.topo.lines import print_verdict, say
from wsync.errors import ConfigError
from wsync.topo.achieved import Achieved, compare_run, decode_prediction, decode_runs
from wsync.topo.files import read_regular
from wsync.topo.findings import Severity


def add_parser(commands: Any) -> None:
    """Add ``achieved``."""
    parser = commands.add_parser(
        "achieved", help="compare a publish with its prediction and say where it is lost", allow_abbrev=False
    )
    parser.add_argument(
        "report", metavar="REPORT", help="a PublishReport as JSON, or what `wsync bench e2e --json` wrote"
    )
    parser.add_argument(
        "--plan", metavar="FILE", required=True, help="what `wsync topo plan --json FILE` wrote, or an encoded plan"
    )
    add_judging_arguments(parser, "comparison")
    parser.set_defaults(run=run_achieved)


def run_achieved(args: argparse.Namespace) -> int:
    """Print the comparison of each publish and return the exit status; less than 90 % of the predicted rate is WARN."""
    return run_judged(args, lambda: _compare(args), _severities, _print_all)


def _compare(args: argparse.Namespace) -> list[Achieved]:
    prediction = decode_prediction(read_regular(args.plan), Path(args.plan).name)
    runs = decode_runs(read_regular(args.report), Path(args.report).name)
    if not runs:
        raise ConfigError(f"{args.report} has no publish of wsync")
    return [compare_run(run, prediction) for run in runs]


def _severities(found: list[Achieved]) -> list[Severity]:
    return ["WARN" for one in found if one.verdict == "WARN"]


def _print_all(found: list[Achieved]) -> None:
    for one in found:
        _print(one)


def _print(one: Achieved) -> None:
    print_verdict(
        one.verdict,
        f"{one.name}: {one.wire_gbps:.4g} of {one.predicted_gbps:.4g} GB/s predicted; wire {one.wire_s:.3g} s of "
        f"{one.total_s:.3g} s, {one.predicted_s:.3g} s predicted; bound by {one.bound}",
    )
    for loss in one.losses:
        say(f"  lost: {loss}")
    for link in one.links[:8]:
        say(f"  {link.name}: {link.achieved_gbps:g} of {link.predicted_gbps:g} GB/s ({link.share:.0%})")
    for phase in one.phases:
        say(f"  {phase.name}: {phase.seconds:.3g} s ({phase.rank}), usually {phase.usual_s:.3g} s")
