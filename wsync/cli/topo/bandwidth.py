"""``wsync topo import-bandwidth``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wsync.cli.output import stdout_console
from wsync.cli.topo.judged import add_judging_arguments, run_judged
from wsync.cli.topo.lines import print_findings, print_verdict
from wsync.cli.topo.table import STYLES
from wsync.topo.bandwidth import MODELS, BandwidthReport, judge_tables
from wsync.topo.bandwidth_parse import Table, parse_tables
from wsync.topo.files import read_regular
from wsync.topo.parse.text import MAX_INPUT_BYTES
from wsync.topo.render.summary import plural


def add_parser(commands: Any) -> None:
    """Add ``import-bandwidth``."""
    parser = commands.add_parser(
        "import-bandwidth", help="compare measured rates with published ones", allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="output of nccl-tests, nvbandwidth or nvloom")
    parser.add_argument("--gpu", metavar="MODEL", choices=MODELS, help=f"model of the GPUs: {', '.join(MODELS)}")
    add_judging_arguments(parser)
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """Print a line for each rate, then findings; return the verdict's exit status."""
    return run_judged(args, lambda: _judge(args), lambda report: [f.severity for f in report.findings], _print)


def _judge(args: argparse.Namespace) -> BandwidthReport:
    return judge_tables([t for f in args.files for t in _read(f)], args.gpu)


def _read(path: str) -> tuple[Table, ...]:
    return parse_tables(read_regular(path, MAX_INPUT_BYTES + 1), Path(path).name)


def _print(report: BandwidthReport) -> None:
    from rich.text import Text

    console = stdout_console()
    print_verdict(report.verdict, plural(len(report.results), "rate"))
    for result in report.results:
        place = f"{result.source}:{result.line}" if result.line else result.source
        text = f" {result.test}, {result.subject}: {result.gbps:g} GB/s; {result.note} [{place}]"
        console.print(Text.assemble((f"{result.verdict:8}", STYLES[result.verdict]), text), soft_wrap=True)
    print_findings(report.findings)
    if report.measured:
        options = " ".join(f"--measured {part}={rate:g}" for part, rate in report.measured.items())
        console.print(f"for wsync topo plan: {options}", markup=False, highlight=False, soft_wrap=True)
