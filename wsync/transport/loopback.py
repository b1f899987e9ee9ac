"""Transport between threads of one process, over plain memory; for tests and single-process use."""

from __future__ import annotations

import secrets
import threading
import weakref

import numpy as np
import numpy.typing as npt

from wsync.errors import ConnectError
from wsync.transport.buffers import Staging
from wsync.transport.offers import Offer
from wsync.transport.segment_end import Segment
from wsync.transport.segments import SegmentSink, SegmentSource


class LocalSegment:
    """A segment in this process's memory; the same calls as the shared-memory one, under one lock."""

    def __init__(self, offer: Offer) -> None:
        self._staging = Staging(len(offer.buckets), offer.bucket_bytes)
        self._slots = [(0, 0, 0, 0)] * len(offer.buckets)  # version, position, digest, bytes
        self._num_published = 0
        self._current = 0
        self._exchange = np.zeros(offer.exchange_elements, dtype=np.float32)
        self._exchange_version = 0
        self._bell = 0
        self._changed = threading.Condition()
        self._closed = False

    def address(self, bucket_pos: int) -> int:
        return self._staging.address(bucket_pos)

    def begin(self, version: int) -> None:
        with self._changed:
            self._current, self._num_published = version, 0

    def publish(self, bucket_pos: int, digest: int, num_bytes: int) -> None:
        with self._changed:
            self._slots[self._num_published] = (self._current, bucket_pos, digest, num_bytes)
            self._num_published += 1

    def take(self, cursor: int, version: int) -> tuple[int, int, int] | None:
        with self._changed:
            if self._current != version or cursor >= self._num_published:
                return None
            return self._slots[cursor][1:]

    def current(self) -> int:
        with self._changed:
            return self._current

    def exchange(self) -> npt.NDArray[np.float32]:
        return self._exchange

    def set_exchange_version(self, version: int) -> None:
        with self._changed:
            self._exchange_version = version

    def exchange_version(self) -> int:
        with self._changed:
            return self._exchange_version

    def bell(self) -> int:
        with self._changed:
            return self._bell

    def ring(self) -> None:
        with self._changed:
            self._bell += 1
            self._changed.notify_all()

    def wait(self, seen: int, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._bell != seen, timeout=seconds)

    def alive(self) -> bool:
        return not self._closed

    def close(self) -> None:
        """The owner is gone; readers keep what they have."""
        self._closed = True

    def detach(self) -> None:
        """Nothing to give back: memory goes with the last end that holds it."""


_segments: weakref.WeakValueDictionary[str, LocalSegment] = weakref.WeakValueDictionary()


class LocalSegments:
    """Makes segments that the threads of this process find by name."""

    name = "loopback"

    def create(self, offer: Offer) -> tuple[Segment, str]:
        name = secrets.token_hex(16)
        segment = LocalSegment(offer)
        _segments[name] = segment
        return segment, name

    def open(self, offer: Offer) -> Segment:
        segment = _segments.get(offer.segment)
        if segment is None:
            raise ConnectError(
                f"the staging of {offer.label} is not in this process, or closed",
                hint="use the shm transport between processes",
            )
        return segment


def loopback_source() -> SegmentSource:
    """A trainer rank's end for sinks in the same process."""
    return SegmentSource(LocalSegments())


def loopback_sink() -> SegmentSink:
    """An engine rank's end for sources in the same process."""
    return SegmentSink(LocalSegments())
