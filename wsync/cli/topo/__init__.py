"""``wsync topo``: one module per subcommand, each with ``add_parser(commands)``; this one only puts them together."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.topo import achieved, advise, bandwidth, check, compare, golden, lint, plan, save
from wsync.cli.topo.exits import EPILOG, usage_status


def add_parser(commands: Any) -> None:
    """Add ``topo`` with its subcommands."""
    parser = commands.add_parser(
        "topo",
        help="check what links GPUs and NICs, of this machine or from what tools print of others",
        description="What links GPUs and NICs, and what that means for a sync. Guide: docs/guides/topo.md.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subcommands = parser.add_subparsers(dest="topo_command", required=True, metavar="COMMAND")
    for module in (check, save, compare, golden, lint, advise, plan, bandwidth, achieved):
        module.add_parser(subcommands)


__all__ = ["add_parser", "usage_status"]
