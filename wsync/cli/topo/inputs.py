"""Files and folders of the command line become a topology: files are of one machine, each folder is a machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from wsync.errors import ConfigError
from wsync.topo.model import Topology
from wsync.topo.parse import read_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs and the machine's name."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|FOLDER",
        help="output of nvidia-smi topo -m, topo -p2p, nvlink -s/-R/-e, -q; NCCL's topology or graph XML or log; "
        "lspci, ibstatus and other host files; what `wsync topo save` wrote. Files are of one machine and are merged; "
        "a folder holds those of one machine and gives it its name",
    )
    parser.add_argument("--host", metavar="NAME", help="name of the machine that the files are of")


def read_inputs(inputs: list[str], host: str | None) -> Topology:
    """Read all inputs.

    Raises:
        ConfigError: a folder without files.
    """
    folders = [Path(p) for p in inputs if Path(p).is_dir()]
    files = [p for p in inputs if not Path(p).is_dir()]
    machines = list(read_files(files, host).machines) if files else []
    for folder in folders:
        members = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not members:
            raise ConfigError(f"folder {str(folder)!r} has no files")
        machines += read_files(members, folder.resolve().name).machines
    return Topology(tuple(machines))
