"""What a transport is: two ends that move packed buckets, and one small reduction among the trainer ranks.

The session decides when; a transport moves. It knows slices and addresses, no framework and no control messages.
Every wait takes a deadline (seconds on `time.monotonic`) and raises `DeadlineError` or `PeerLostError`.

Order of calls on the source end, from one thread:  ``prepare`` once; then for each version ``begin``,
``exchange_max`` where the plan needs it, for each bucket (pack into ``address``, then ``send``), ``flush``.
On the sink end: ``prepare`` once; then for each version ``receive`` until all buckets came, ``release``.

``version`` is the session's publish sequence: it increases strictly, and a failed publish burns its number. A failed
publish needs no call: the next version begins, at all ends that are left, and takes nothing of the failed one.

One sick sink costs its own replica and nobody else's version: a source goes on without it and names it in
`SourceEnd.lost_sinks`. A sink that is lost stays lost until the ends are closed and opened anew. A trainer rank that is
gone makes the transport useless to those that need it, and so does a sink that relays to its children.

`close` may come from another thread than the calls, also during one of them: that call ends with an error, and memory
whose addresses were given out for an unfinished version stays mapped until the end itself is no longer referenced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from wsync.plan.types import SinkSlice, SourceSlice

Cancelled = Callable[[], None]
"""Called about every 10 ms inside waits; raises the error that should end the wait (an abort, a lost peer)."""


def never_cancelled() -> None:
    """A `Cancelled` that never raises."""


class Staged(msgspec.Struct, frozen=True):
    """A bucket that arrived.

    Attributes:
        bucket_pos: position in the slice's buckets.
        address: of its first byte in this process; valid until `SinkEnd.release`.
        digest: what the sender computed while packing.
        num_bytes: that arrived: as many as were sent, the bucket's used bytes or fewer.
    """

    bucket_pos: int
    address: int
    digest: int
    num_bytes: int


class SourceEnd(Protocol):
    """A trainer rank's end."""

    def prepare(self, slice_: SourceSlice, num_sources: int) -> bytes:
        """Allocate staging (zeroed, faulted in) and return what the other ends need to reach it (the *offer*)."""

    def connect(
        self,
        source_offers: list[bytes],
        sink_offers: list[bytes],
        deadline: float,
        cancelled: Cancelled = never_cancelled,
    ) -> None:
        """Get the offers of all ends, in order of rank and sink index. After this nothing is allocated any more.

        What ``cancelled`` raises ends the wait for the other ends, and then, as after every error but `StateError`
        (connected already), the end is good for `close` only.

        Raises:
            PeerLostError: other ends did not come or died meanwhile; the message names them.
        """

    def begin(self, version: int, deadline: float, cancelled: Cancelled) -> None:
        """Start a version: wait until staging may be overwritten."""

    def address(self, bucket_pos: int) -> int:
        """Where to pack the slice's bucket of that position."""

    def exchange_max(self, vector: npt.NDArray[np.float32], deadline: float, cancelled: Cancelled) -> None:
        """Elementwise maximum over all trainer ranks, in place."""

    def send(
        self, bucket_pos: int, digest: int, deadline: float, cancelled: Cancelled, num_bytes: int | None = None
    ) -> None:
        """The bucket is packed: make it visible or send it. Waits for no sink, and never raises because of one.

        ``num_bytes``: of the bucket's used bytes only the first so many are the message; None means all.
        """

    def flush(self, deadline: float, cancelled: Cancelled) -> None:
        """Wait until nothing of this rank is on its way any more to a sink that is not lost.

        A sink that lives and does not receive is waited for until the deadline or until ``cancelled`` raises.
        """

    def lost_sinks(self) -> dict[int, str]:
        """Sinks that get nothing from here any more: sink index -> reason. Empty where all are well.

        Always empty for transports whose sinks read by themselves (shm, loopback). May be called from the thread of the
        other calls at any time between `connect` and `close`, and keeps its answer after `close`.
        """

    def close(self) -> None:
        """Give everything back. May be called twice, after an error, and from another thread (see the module)."""


class SinkEnd(Protocol):
    """An engine rank's end."""

    def prepare(self, slice_: SinkSlice) -> bytes:
        """Allocate staging and return this end's offer."""

    def connect(
        self,
        source_offers: list[bytes],
        sink_offers: list[bytes],
        deadline: float,
        cancelled: Cancelled = never_cancelled,
    ) -> None:
        """Get the offers of all ends; see `SourceEnd.connect`."""

    def receive(self, version: int, deadline: float, cancelled: Cancelled) -> Iterator[Staged]:
        """Yield every bucket of the slice as it arrives, and relay those that other sinks get from here."""

    def still_valid(self, version: int) -> bool:
        """Whether what was received for ``version`` has not been overwritten by a later one."""

    def release(self, version: int) -> None:
        """Staging of ``version`` is no longer read."""

    def close(self) -> None:
        """Give everything back. May be called twice, after an error, and from another thread (see the module)."""
