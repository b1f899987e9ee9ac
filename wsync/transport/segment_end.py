"""What both ends over shared staging are made of: segments, offers, and waiting on the own doorbell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from wsync.errors import ConfigError, PeerLostError, StateError
from wsync.transport.lifetime import Lease
from wsync.transport.offers import Offer, decode_offers, encode_offer
from wsync.transport.waiting import Patience

F32 = npt.NDArray[np.float32]

LIVENESS_EVERY = 5
"""Wait slices between two looks at whether the awaited processes live: one costs a system call per peer."""


Lost = Callable[[], str | None]
"""Label of the first awaited peer that is gone."""


class Segment(Protocol):
    """One end of a segment; ``csrc/shm/segment.h`` documents each call."""

    def address(self, bucket_pos: int) -> int: ...
    def begin(self, version: int) -> None: ...
    def publish(self, bucket_pos: int, digest: int, num_bytes: int) -> None: ...
    def take(self, cursor: int, version: int) -> tuple[int, int, int] | None: ...
    def current(self) -> int: ...
    def exchange(self) -> F32: ...
    def set_exchange_version(self, version: int) -> None: ...
    def exchange_version(self) -> int: ...
    def bell(self) -> int: ...
    def ring(self) -> None: ...
    def wait(self, seen: int, seconds: float) -> bool: ...
    def alive(self) -> bool: ...
    def close(self) -> None:
        """The owner ends it; readers find it not alive and keep what they have. The memory goes with the object."""

    def detach(self) -> None:
        """A reader leaves. The memory goes with the object."""


class SegmentKind(Protocol):
    """Makes and opens segments of one kind."""

    name: str

    def create(self, offer: Offer) -> tuple[Segment, str]:
        """Create the segment that ``offer`` describes; returns it and its name."""

    def open(self, offer: Offer) -> Segment:
        """Open the segment of another end."""


class SegmentEnd:
    """What both ends share: own segment, offers, waiting on the own doorbell."""

    def __init__(self, kind: SegmentKind) -> None:
        self._kind = kind
        self._own: Segment | None = None
        self._offer: Offer | None = None
        self._opened: list[Segment] = []
        self._connected = False
        self._version = 0
        self._lease = Lease()

    def _prepare(self, offer: Offer) -> bytes:
        if self._own is not None:
            raise StateError(f"{offer.label} was prepared twice")
        self._own, name = self._kind.create(offer)
        self._offer = msgspec.structs.replace(offer, segment=name)
        return encode_offer(self._offer)

    @property
    def own(self) -> Segment:
        if self._own is None:
            raise StateError("the transport is not prepared, or closed")
        return self._own

    @property
    def offer(self) -> Offer:
        if self._offer is None:
            raise StateError("the transport is not prepared")
        return self._offer

    def _decode(self, source_offers: list[bytes], sink_offers: list[bytes]) -> tuple[list[Offer], list[Offer]]:
        self.own  # noqa: B018  raises where closed
        if self._connected:
            raise StateError(f"{self.offer.label} was connected twice")
        return decode_offers(self.offer, source_offers, sink_offers)

    def _open(self, other: Offer) -> Segment:
        if other.host != self.offer.host:
            raise ConfigError(
                f"{other.label} and {self.offer.label} share no memory",
                hint="use the gloo transport between hosts or containers",
            )
        segment = self._kind.open(other)
        self._opened.append(segment)
        if not segment.alive():
            raise PeerLostError(f"{other.label} died or closed its transport before {self.offer.label} connected to it")
        return segment

    def _check_connected(self) -> None:
        if not self._connected:
            raise StateError("the transport is not connected, or closed")

    def _wait(
        self, patience: Patience, ready: Callable[[], bool], waited_for: Callable[[], str], find_lost: Lost
    ) -> None:
        """Call ``ready`` after every ring of the own doorbell until it is true."""
        num_slices = 0
        while True:
            seen = self.own.bell()
            if ready():
                return
            patience.check(waited_for)
            if num_slices % LIVENESS_EVERY == LIVENESS_EVERY - 1 and (lost := find_lost()) is not None and not ready():
                raise PeerLostError(f"{lost} died or closed its transport: {waited_for()}")
            self.own.wait(seen, patience.slice_s)
            num_slices += 1

    def close(self) -> None:
        """Give everything back; see `SourceEnd.close`.

        Memory is unmapped with the last reference to its segment, never under a running reader or writer: a call in
        another thread holds one, and where a version is under way, so does the lease.
        """
        self._connected = False
        own, self._own = self._own, None
        opened, self._opened = self._opened, []
        if own is not None:
            self._lease.keep(own)
            own.close()
        self._lease.keep(*opened)
        for segment in opened:
            segment.ring()  # whoever waits looks at once, and finds this end closed
            segment.detach()
