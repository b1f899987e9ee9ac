"""Waiting with a deadline and a way out."""

from __future__ import annotations

import time
from collections.abc import Callable

from wsync.errors import DeadlineError
from wsync.transport.base import Cancelled

SLICE_S = 0.01
"""Longest uninterrupted wait; `Cancelled` is called at least this often."""


class Patience:
    """How long one call may still wait.

    `check` is cheap enough to be called for every bucket: it looks at the clock, and calls ``cancelled`` every 10 ms.
    """

    def __init__(self, deadline: float, cancelled: Cancelled) -> None:
        self._began = time.monotonic()
        self._deadline = deadline
        self._cancelled = cancelled
        self._next_call = self._began

    @classmethod
    def for_seconds(cls, seconds: float) -> Patience:
        """Wait that long at most, whatever happens elsewhere."""
        return cls(time.monotonic() + seconds, lambda: None)

    def check(self, waited_for: Callable[[], str]) -> None:
        """Raise what ``cancelled`` raises, or `DeadlineError` once the time is over.

        Args:
            waited_for: makes the sentence's subject, such as "rank 0 waited for bucket 3 of rank 1".
        """
        now = time.monotonic()
        if now >= self._next_call:
            self._next_call = now + SLICE_S
            self._cancelled()
        if now >= self._deadline:
            raise DeadlineError(f"{waited_for()}, gave up after {now - self._began:.2f} s")

    @property
    def slice_s(self) -> float:
        """Seconds to sleep before the next `check`."""
        return max(0.0, min(SLICE_S, self._deadline - time.monotonic()))


def remaining_s(deadline: float) -> float:
    """Seconds until ``deadline``; never below one millisecond, which is what timeouts of others accept."""
    return max(0.001, deadline - time.monotonic())
