"""Where the ranks of a described side run."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.errors import ConfigError
from wsync.spec.manifest import DEVICE, HOST, Memory, RankInfo


def rank_infos(hosts: Sequence[str], gpus: Sequence[int] | None, memory: Memory) -> tuple[RankInfo, ...]:
    """One for each rank, whose number stands for its process.

    Raises:
        ConfigError: not as many GPUs as hosts, or a memory that is none.
    """
    if memory not in (DEVICE, HOST):
        raise ConfigError(f"memory is {memory!r}, allowed are {DEVICE!r} and {HOST!r}")
    if gpus is not None and len(gpus) != len(hosts):
        raise ConfigError(
            f"{len(gpus)} gpus are given for {len(hosts)} ranks", hint="name the GPU of every rank, or of none"
        )
    return tuple(
        RankInfo(host, i, gpu=None if gpus is None else gpus[i], memory=memory) for i, host in enumerate(hosts)
    )


def positions(hosts: Sequence[str]) -> list[int]:
    """For each rank how many of the ranks before it are on its host: its GPU, where a side has the host's first."""
    seen: dict[str, int] = {}
    out = []
    for host in hosts:
        out.append(seen.get(host, 0))
        seen[host] = out[-1] + 1
    return out
