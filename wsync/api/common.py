"""What both sides of the public surface share: checks of arguments, and an orderly end."""

from __future__ import annotations

import atexit
import operator
import os
import re
import weakref
from typing import Protocol

from wsync.errors import ConfigError


class _Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closable] = weakref.WeakSet()


def close_at_exit(closable: _Closable) -> None:
    """Close it before the interpreter ends: threads that still pack or stage would touch memory that is freed."""
    _open.add(closable)


@atexit.register
def _close_all() -> None:
    for closable in list(_open):
        closable.close()


def share_of_cores(num_threads: int | None, ranks_here: int) -> int:
    """Threads of one rank: what was asked for, or this process's cores shared by the ranks of the side that run here.

    Raises:
        ConfigError: ``num_threads`` is below 1.
    """
    if num_threads is None:
        return max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))
    if num_threads < 1:
        raise ConfigError(f"num_threads must be at least 1, got {num_threads}")
    return num_threads


def whole_number(value: object, name: str) -> int:
    """An integer of any kind (Python's, NumPy's, a 0-d integer tensor) as a plain int.

    Raises:
        ConfigError: it is none, or a bool.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}") from None


def check_store(store: str) -> None:
    """Refuse what is no address.

    Raises:
        ConfigError: it is not ``tcp://host:port``.
    """
    if not re.fullmatch(r"tcp://[^\s:]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}", store):
        raise ConfigError(f"store must be tcp://host:port, got {store!r}")


def rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as given, or torch.distributed's where it is initialised, or 0 and 1.

    Raises:
        ConfigError: only one is given, or the rank is not below the world size.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError(f"give both rank and world_size or neither, got rank={rank} and world_size={world_size}")
    if rank is None or world_size is None:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world_size), got rank={rank} and world_size={world_size}")
    return rank, world_size
