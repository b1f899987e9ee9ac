"""``wsync topo compare``."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.output import check_writable, print_error, stdout_console, write_json
from wsync.cli.topo.exits import exit_of
from wsync.cli.topo.hosts import read_hosts
from wsync.cli.topo.lines import print_findings, print_verdict
from wsync.errors import ConfigError
from wsync.topo.compare import Comparison, compare


def add_parser(commands: Any) -> None:
    """Add ``compare``."""
    parser = commands.add_parser("compare", help="find the hosts that differ from the others", allow_abbrev=False)
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE|FOLDER", help="of one host each: what `wsync topo save` wrote, or its files"
    )
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write the comparison as JSON (-: to stdout)"
    )
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    """Print groups and outliers, and return the verdict's exit status."""
    check_writable(args.json, "--json")
    try:
        machines = read_hosts(args.inputs)
        if len(machines) < 2:
            raise ConfigError(f"compare needs at least 2 hosts, got {len(machines)}")
        found = compare(machines)
    except ConfigError as e:
        print_error(e)
        return exit_of("UNKNOWN")
    if args.json:
        write_json(found, args.json)
    if args.json != "-":
        _print(found, len(machines))
    return exit_of(found.verdict)


def _print(found: Comparison, num_hosts: int) -> None:
    kinds = "all alike" if len(found.groups) == 1 else f"{len(found.groups)} kinds"
    print_verdict(found.verdict, f"{num_hosts} hosts, {kinds}")
    for group in found.groups:
        hosts = ", ".join(group.hosts[:8]) + (f" and {len(group.hosts) - 8} more" if len(group.hosts) > 8 else "")
        line = f"  {group.fingerprint}  {len(group.hosts)} hosts: {hosts}"
        stdout_console().print(line, markup=False, highlight=False, soft_wrap=True)
    print_findings(found.findings)
