"""Deadlines and stamps on the monotonic clock."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsync.errors import ConfigError, DeadlineError
from wsync.session.messages import Stamp
from wsync.spec.manifest import RankInfo
from wsync.transport import host_identity


def deadline_after(seconds: float) -> float:
    """The monotonic time at which a wait of ``seconds`` ends.

    Raises:
        ConfigError: ``seconds`` is no positive finite number.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"deadline_s must be a positive number of seconds, got {seconds!r}")
    return time.monotonic() + seconds


def remaining(deadline: float, what: str) -> float:
    """Seconds left.

    Raises:
        DeadlineError: none are; the message names ``what`` was waited for.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError(f"ran out of time waiting for {what}")
    return left


class Stopwatch:
    """Collects the phases of one rank."""

    def __init__(self) -> None:
        self.stamps: list[Stamp] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.stamps.append(Stamp(name, begin, time.monotonic()))

    def take(self) -> tuple[Stamp, ...]:
        """What was collected since the last call."""
        stamps, self.stamps = tuple(self.stamps), []
        return stamps


def local_info() -> RankInfo:
    """Where this process runs. Containers of one machine with separate /dev/shm count as separate hosts."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return RankInfo(host_identity(), os.getpid(), namespace)


def process_is_gone(info: RankInfo, own: RankInfo) -> bool:
    """Whether ``info`` names a process of this host and pid namespace that does not exist any more."""
    if info.host != own.host or not info.pid_namespace or info.pid_namespace != own.pid_namespace:
        return False
    try:
        state = Path(f"/proc/{info.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state in ("Z", "X")
