"""``wsync topo import-bandwidth``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wsync.cli.output import check_writable, print_error, stdout_console, write_json
from wsync.cli.topo.exits import exit_of
from wsync.cli.topo.lines import print_findings, print_verdict
from wsync.cli.topo.table import STYLES
from wsync.errors import ConfigError
from wsync.topo.bandwidth import MODELS, BandwidthReport, judge_tables
from wsync.topo.bandwidth_parse import Table, parse_tables
from wsync.topo.parse.text import MAX_INPUT_BYTES


def add_parser(commands: Any) -> None:
    """Add ``import-bandwidth``."""
    parser = commands.add_parser(
        "import-bandwidth", help="compare measured rates with published ones", allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="output of nccl-tests, nvbandwidth or nvloom")
    parser.add_argument("--gpu", metavar="MODEL", choices=MODELS, help=f"model of the GPUs: {', '.join(MODELS)}")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the report as JSON (-: to stdout)")
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """Print a line for each rate, then findings; return the verdict's exit status."""
    check_writable(args.json, "--json")
    try:
        tables = [t for f in args.files for t in _read(f)]
        report = judge_tables(tables, args.gpu)
    except ConfigError as e:
        print_error(e)
        return exit_of("UNKNOWN")
    if args.json:
        write_json(report, args.json)
    if args.json != "-":
        _print(report)
    return exit_of(report.verdict)


def _read(path: str) -> tuple[Table, ...]:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_INPUT_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    return parse_tables(data, Path(path).name)


def _print(report: BandwidthReport) -> None:
    from rich.text import Text

    console = stdout_console()
    print_verdict(report.verdict, f"{len(report.results)} rates")
    for result in report.results:
        place = f"{result.source}:{result.line}" if result.line else result.source
        text = f" {result.test}, {result.subject}: {result.gbps:g} GB/s; {result.note} [{place}]"
        console.print(Text.assemble((f"{result.verdict:8}", STYLES[result.verdict]), text), soft_wrap=True)
    print_findings(report.findings)
    if report.measured:
        options = " ".join(f"--measured {part}={rate:g}" for part, rate in report.measured.items())
        console.print(f"for wsync topo plan: {options}", markup=False, highlight=False, soft_wrap=True)
