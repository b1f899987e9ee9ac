"""How much memory a process needs beyond what it had: sampled proportional set size (Linux)."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from types import TracebackType

_ROLLUP = Path("/proc/self/smaps_rollup")
_FIELDS = ("Pss_Anon:", "Pss_Shmem:")
_PERIOD_S = 0.02


def settle() -> None:
    """Collect garbage and give freed memory back to the system, so that the next row starts from what is in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def owned_bytes() -> int:
    """Anonymous and shared memory of this process, shared pages divided by the processes that map them.

    File pages are left out: they are page cache, which the kernel takes back when it needs it. 0 where unknown.
    """
    try:
        lines = _ROLLUP.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_FIELDS))


class PeakMemory:
    """Samples `owned_bytes` in a thread while it is entered.

    Attributes:
        peak_bytes: the highest sample.

    It slows the process down (a sample walks the page tables): never enter it in what is timed.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="wsync-bench-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, owned_bytes())
            if self._stop.wait(_PERIOD_S):
                self.peak_bytes = max(self.peak_bytes, owned_bytes())
                return
