"""Inputs where every file is a host of its own: what ``wsync topo save`` wrote of each, or a folder with its files."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from wsync.cli.topo.inputs import read_inputs
from wsync.topo.model import Machine


def read_hosts(inputs: list[str]) -> list[Machine]:
    """One machine for each file or folder, or several where a file has several; a file without a host gives its name.

    Raises:
        ConfigError: a folder without files.
    """
    found: list[Machine] = []
    for item in inputs:
        machines = read_inputs([item], None).machines
        stem = Path(item).name.split(".")[0]
        found += [replace(m, host=m.host or stem) for m in machines]
    return found
