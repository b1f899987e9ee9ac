"""The command line's inputs become a topology: this machine itself, files of one machine, folders of one each."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from msgspec.structs import replace

from wsync.errors import ConfigError
from wsync.topo.live import TIMEOUT_S, LiveOptions, read_live
from wsync.topo.merge import merge_machines
from wsync.topo.model import Gap, Machine, Topology
from wsync.topo.parse import read_files

LIVE = LiveOptions()
"""Where tests put their own probes; the command line sets the deadline and the root only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs and the machine's name."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FILE|FOLDER",
        help="output of nvidia-smi topo -m, topo -p2p, nvlink -s/-R/-e, -q; NCCL's topology or graph XML or log; "
        "lspci, ibstatus and other host files; what `wsync topo save` wrote. Files are of one machine and are merged; "
        "a folder holds those of one machine and gives it its name. Without any, this machine is read",
    )
    parser.add_argument("--host", metavar="NAME", help="name of the machine, where no input tells it")
    parser.add_argument("--live", action="store_true", help="read this machine, too; files are of it and are merged")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=TIMEOUT_S,
        help="reading this machine ends then (default: %(default)g)",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        default="/",
        help="DIR/sys and DIR/proc are this machine's (a container's mount of them)",
    )


def live_options(args: argparse.Namespace) -> LiveOptions | None:
    """How this machine is to be read; None if it is not."""
    if args.inputs and not args.live:
        return None
    return replace(LIVE, timeout_s=args.timeout, root=args.root)


def read_inputs(inputs: list[str], host: str | None, live: LiveOptions | None = None) -> Topology:
    """Read all inputs.

    Args:
        inputs: files and folders.
        host: name of the machine of the files.
        live: read this machine, too.

    Raises:
        ConfigError: an empty name; a folder without files; this machine cannot be read and there are no files that
            could be judged.
    """
    if "" in inputs:
        raise ConfigError("an input has an empty name", hint="a variable of the shell may be unset")
    folders = [Path(p) for p in inputs if Path(p).is_dir()]
    files = [p for p in inputs if not Path(p).is_dir()]
    machines = list(read_files(files, host).machines) if files else []
    if live is not None:
        machines = list(merge_machines([_read_live(live, host, alone=not machines), *machines]))
    for folder in folders:
        members = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not members:
            raise ConfigError(f"folder {str(folder)!r} has no files")
        machines += read_files(members, folder.resolve().name).machines
    return Topology(tuple(machines))


def _read_live(live: LiveOptions, host: str | None, alone: bool) -> Machine:
    """This machine; beside files a machine that cannot be read makes the verdict UNKNOWN, and they are judged."""
    try:
        return read_live(live, host)
    except ConfigError as e:
        if alone:
            raise
        # By the name that it has when it can be read: monitoring systems know it by that.
        host = host or platform.node() or None
        return Machine(host=host, gaps=(Gap(f"{e.message} ({e.hint})", "this machine", fatal=True),), sources=("live",))
