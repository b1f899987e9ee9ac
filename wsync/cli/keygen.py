"""``wsync keygen``."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.output import EXIT_OK


def add_parser(commands: Any) -> None:
    """Add ``keygen``."""
    parser = commands.add_parser(
        "keygen", help="write a fresh key file, which every rank of a job gets", allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="must not exist yet; mode 0600")
    parser.set_defaults(run=run_keygen)


def run_keygen(args: argparse.Namespace) -> int:
    """Write the key and print its path."""
    from wsync.session.auth import new_key_file

    print(new_key_file(args.file))
    return EXIT_OK
