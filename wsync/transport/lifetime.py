"""How long staging outlives `close`: while a version is under way, another thread may be working at its addresses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Lease:
    """What one end's user holds from the start of a version until it is done with the addresses of that version.

    `close` of the end may come from any thread. Memory it gives up while the lease is held is kept by the lease: until
    the user ends the version (a call of the end returned it, or raised), or the end is no longer referenced.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version = 0
        self._kept: list[object] = []

    def begin(self, version: int) -> None:
        """Addresses of ``version`` are used from now on."""
        with self._lock:
            self._version = version

    def end(self, version: int) -> None:
        """Addresses of ``version`` are no longer used. Says nothing about a later version."""
        with self._lock:
            if self._version != version:
                return
            self._version = 0
            kept, self._kept = self._kept, []
        kept.clear()  # unmapping takes time and needs no lock

    def keep(self, *memory: object) -> None:
        """Hold what owns the memory for as long as the lease is held; nothing happens where it is not."""
        with self._lock:
            if self._version:
                self._kept.extend(memory)

    @contextmanager
    def ending_on_error(self, version: int) -> Iterator[None]:
        """A call of the user's that ends its version if it raises."""
        try:
            yield
        except BaseException:
            self.end(version)
            raise
