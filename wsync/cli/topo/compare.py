"""``wsync topo compare``."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.topo.hosts import read_hosts
from wsync.cli.topo.judged import add_judging_arguments, run_judged
from wsync.cli.topo.lines import print_findings, print_verdict, say
from wsync.errors import ConfigError
from wsync.topo.compare import Comparison, compare
from wsync.topo.model import Machine
from wsync.topo.render.summary import plural


def add_parser(commands: Any) -> None:
    """Add ``compare``."""
    parser = commands.add_parser("compare", help="find the hosts that differ from the others", allow_abbrev=False)
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE|FOLDER", help="of one host each: what `wsync topo save` wrote, or its files"
    )
    add_judging_arguments(parser, "comparison")
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    """Print groups and outliers, and return the verdict's exit status."""
    machines: list[Machine] = []

    def judge() -> Comparison:
        machines.extend(read_hosts(args.inputs))
        if len(machines) < 2:
            raise ConfigError(f"compare needs at least 2 hosts, got {len(machines)}")
        return compare(machines)

    return run_judged(
        args, judge, lambda found: [f.severity for f in found.findings], lambda found: _print(found, len(machines))
    )


def _print(found: Comparison, num_hosts: int) -> None:
    kinds = "all alike" if len(found.groups) == 1 else f"{len(found.groups)} kinds"
    print_verdict(found.verdict, f"{num_hosts} hosts, {kinds}")
    for group in found.groups:
        hosts = ", ".join(group.hosts[:8]) + (f" and {len(group.hosts) - 8} more" if len(group.hosts) > 8 else "")
        line = f"  {group.fingerprint}  {plural(len(group.hosts), 'host')}: {hosts}"
        say(line)
    print_findings(found.findings)
