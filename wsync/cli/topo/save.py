"""``wsync topo save``: inputs of one or more machines, merged into one JSON file that ``wsync topo`` reads."""

from __future__ import annotations

import argparse
from typing import Any

from wsync.cli.output import EXIT_OK, check_writable, write_data
from wsync.cli.topo.inputs import add_arguments, live_options, read_inputs
from wsync.errors import ConfigError
from wsync.topo.parse.saved import encode_topology


def add_parser(commands: Any) -> None:
    """Add ``save``."""
    parser = commands.add_parser("save", help="merge inputs into one JSON file", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the file to write")
    parser.set_defaults(run=run_save)


def run_save(args: argparse.Namespace) -> int:
    """Write the file; an input that cannot be used is an error here.

    Raises:
        ConfigError: an input cannot be read, or the file cannot be written.
    """
    check_writable(args.output, "--output")
    topology = read_inputs(args.inputs, args.host, live_options(args))
    for gap in (g for m in topology.machines for g in m.gaps if g.fatal):
        raise ConfigError(gap.what)
    write_data(args.output, encode_topology(topology))
    return EXIT_OK
