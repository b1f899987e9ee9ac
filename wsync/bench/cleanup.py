"""What must not outlive a benchmark: its folders and its processes."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from wsync.errors import ConfigError

_PR_SET_PDEATHSIG = 1

MEMORY_FOLDER = Path("/dev/shm")
"""Where a file is in memory, on Linux."""


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def temporary_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that is gone when the block ends.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"wsync-bench-{os.getpid()}-", dir=parent))
    except OSError as e:
        raise ConfigError(f"no folder can be made in {parent or tempfile.gettempdir()}: {e.strerror}") from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def memory_folder(otherwise: Path | None) -> Path | None:
    """Where temporary files are in memory; ``otherwise`` where there is no such place."""
    return MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else otherwise


def die_with(parent: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """Make this process, and what it executes, end with ``parent``, however that one ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, sig)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
