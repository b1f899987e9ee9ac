"""Where the ranks of a described side run: hosts, and the GPUs of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.spec.files import read_file

MAX_HOSTS_BYTES = 16 << 20
MAX_GPU = 4095
"""The largest index that a list of GPUs may have; no machine has so many."""
DEFAULT_GPUS_PER_NODE = 8

_GPUS = re.compile(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*")


class Placed(NamedTuple):
    """The host of each rank, and its GPU there; None leaves that to the planner."""

    hosts: list[str]
    gpus: list[int] | None


class Entry(NamedTuple):
    """A line of a file of hosts: a name, and the GPUs that ranks use there if it says so."""

    host: str
    gpus: tuple[int, ...] | None


class Hosts(NamedTuple):
    """What the command line says of hosts.

    Attributes:
        file: with a line for each rank or node, or None.
        prefix: of the names of hosts, where there is no file.
        per_node: ranks of a host; None for as many as GPUs are listed, else for eight.
        gpus: that ranks use on each host whose own are not listed; None leaves it to the planner.
    """

    file: str | None
    prefix: str | None
    per_node: int | None
    gpus: tuple[int, ...] | None

    @property
    def each(self) -> int:
        """Ranks of a host."""
        return self.per_node or (DEFAULT_GPUS_PER_NODE if self.gpus is None else len(self.gpus))

    def place(self, num_ranks: int, default_prefix: str) -> Placed:
        """Where the ranks of a layout run.

        Raises:
            ConfigError: the file is none, has too few hosts or GPUs, or lists a GPU twice.
        """
        if self.file is None:
            prefix = default_prefix if self.prefix is None else self.prefix
            hosts = [f"{prefix}{rank // self.each}" for rank in range(num_ranks)]
            own = self.gpus
            return Placed(hosts, None if own is None else [own[rank % len(own)] for rank in range(num_ranks)])
        entries = read_hosts(Path(self.file))
        if self.gpus is None and all(entry.gpus is None for entry in entries):
            return Placed(self._by_count([entry.host for entry in entries], num_ranks), None)
        return self._by_gpu(entries, num_ranks)

    def _by_count(self, names: list[str], num_ranks: int) -> list[str]:
        num_nodes = -(-num_ranks // self.each)
        if len(names) == num_nodes:
            return [names[rank // self.each] for rank in range(num_ranks)]
        # A layout may leave open how many ranks there are: then the file says it, and the layout refuses what does not
        # fit.
        if len(names) < num_nodes:
            raise ConfigError(
                f"{self.file} has {len(names)} hosts, but the layout has {num_ranks} ranks on {num_nodes} nodes of "
                f"{self.each}"
            )
        return names

    def _by_gpu(self, entries: Sequence[Entry], num_ranks: int) -> Placed:
        """One rank on each GPU, in order."""
        default = tuple(range(self.each)) if self.gpus is None else self.gpus
        placed = [(e.host, gpu) for e in entries for gpu in (default if e.gpus is None else e.gpus)]
        seen: set[tuple[str, int]] = set()
        for host, gpu in placed:
            if (host, gpu) in seen:
                raise ConfigError(
                    f"{self.file} lists GPU {gpu} of host {host!r} twice",
                    hint="a line NAME without GPUs stands for the whole node",
                )
            seen.add((host, gpu))
        if len(placed) < num_ranks:
            raise ConfigError(f"{self.file} lists {len(placed)} GPUs, but the layout has {num_ranks} ranks")
        return Placed([host for host, _ in placed], [gpu for _, gpu in placed])


def parse_hosts(file: str | None, prefix: str | None, per_node: int | None, gpus: str | None) -> Hosts:
    """What four options say.

    Raises:
        ConfigError: they contradict each other, or one is none.
    """
    if per_node is not None and per_node < 1:
        raise ConfigError(f"--gpus-per-node is {per_node}, allowed are numbers from 1")
    listed = None if gpus is None else parse_gpus(gpus, f"--gpus {gpus}")
    if per_node is not None and listed is not None and per_node != len(listed):
        raise ConfigError(f"--gpus {gpus} lists {len(listed)} GPUs of a host, but --gpus-per-node is {per_node}")
    if file is not None and prefix is not None:
        raise ConfigError(f"--host-prefix {prefix} and --hosts {file} both name the hosts")
    return Hosts(file, prefix, per_node, listed)


def parse_gpus(text: str, what: str) -> tuple[int, ...]:
    """A list such as ``4-7`` or ``0,2,5-6``, in its order.

    Args:
        text: the list.
        what: it is, for messages.

    Raises:
        ConfigError: it is no list, or has a GPU twice.
    """
    if not _GPUS.fullmatch(text):
        raise ConfigError(f"{what}: {text!r} is no list of GPUs, such as 4-7 or 0,2,5-6")
    found: dict[int, None] = {}  # in order; what is refused at once never grows
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not low <= high <= MAX_GPU:
            raise ConfigError(f"{what}: {part} is no range of GPUs, allowed are indices from 0 to {MAX_GPU}, ascending")
        for gpu in range(low, high + 1):
            if gpu in found:
                raise ConfigError(f"{what} lists GPU {gpu} twice")
            found[gpu] = None
    return tuple(found)


def read_hosts(path: Path) -> list[Entry]:
    """The lines of a file of hosts, ``NAME`` or ``NAME:GPUS``, without empty ones and comments.

    Raises:
        ConfigError: it cannot be read, is no text, or a line is none of these.
    """
    try:
        lines = read_file(path, MAX_HOSTS_BYTES).decode().splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not a list of hosts: {e}") from e
    entries = []
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if line and not line.startswith("#"):
            # An IPv6 address has colons of its own.
            name, colon, gpus = line.partition(":") if line.count(":") == 1 else (line, "", "")
            if colon and not name:
                raise ConfigError(f"{path}, line {number}: {line!r} names no host")
            entries.append(Entry(name, parse_gpus(gpus, f"{path}, line {number}") if colon else None))
    return entries
