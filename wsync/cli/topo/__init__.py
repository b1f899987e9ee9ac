"""``wsync topo``: one module per subcommand, each with ``add_parser(commands)``; this one only puts them together."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.topo import achieved, advise, bandwidth, check, compare, golden, lint, plan, save

_EPILOG = """exit status of check (Nagios):
  0  OK        nothing above INFO
  1  WARN
  2  CRIT
  3  UNKNOWN   an input cannot be read, or too much of it is missing"""


def add_parser(commands: Any) -> None:
    """Add ``topo`` with its subcommands."""
    parser = commands.add_parser(
        "topo",
        help="check what links this machine's GPUs and NICs, from what tools print of it",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subcommands = parser.add_subparsers(dest="topo_command", required=True, metavar="COMMAND")
    for module in (check, save, compare, golden, lint, advise, plan, bandwidth, achieved):
        module.add_parser(subcommands)
