"""Ends over staging that both sides can address: in-process memory, or shared memory of one host.

Each trainer rank owns a segment with its buckets, each sink a segment without buckets, for its doorbell. A source
packs into its segment, publishes the bucket there and rings the sinks that need it; sinks read in place, so relay hops
are not used. Buckets are published in a log that sinks follow with a cursor; every entry carries the version, which
never repeats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wsync.errors import ConfigError, ConnectError, PeerLostError, PlanMismatchError, StateError, TransportError
from wsync.plan.types import SinkSlice, SourceSlice
from wsync.transport.base import Cancelled, Staged, never_cancelled
from wsync.transport.checks import check_exchange, check_next_version, check_send, check_sink_slice, check_source_slice
from wsync.transport.offers import OFFER_FORMAT, Offer, host_identity
from wsync.transport.segment_end import F32, Segment, SegmentEnd, SegmentKind
from wsync.transport.waiting import Patience


class SegmentSource(SegmentEnd):
    """A trainer rank's end; see `wsync.transport.base.SourceEnd`."""

    def __init__(self, kind: SegmentKind) -> None:
        super().__init__(kind)
        self._slice: SourceSlice | None = None
        self._bells: dict[int, Segment] = {}
        self._peers: dict[int, tuple[Offer, Segment]] = {}
        self._sent: set[int] = set()
        self._exchanged = False

    def prepare(self, slice_: SourceSlice, num_sources: int) -> bytes:
        check_source_slice(slice_, num_sources)
        sinks = {sink for bucket in slice_.buckets for sink in bucket.sinks}
        self._slice = slice_
        return self._prepare(
            Offer(
                format_version=OFFER_FORMAT,
                transport=self._kind.name,
                side="source",
                rank=slice_.rank,
                plan_digest=slice_.plan_digest,
                host=host_identity(),
                bucket_bytes=slice_.bucket_bytes,
                buckets=tuple(bucket.bucket_idx for bucket in slice_.buckets),
                exchange_elements=slice_.amax_elements,
                num_openers=len(sinks) + (num_sources - 1 if slice_.amax_elements else 0),
            )
        )

    def connect(
        self,
        source_offers: list[bytes],
        sink_offers: list[bytes],
        deadline: float,
        cancelled: Cancelled = never_cancelled,
    ) -> None:
        sources, sinks = self._decode(source_offers, sink_offers)
        cancelled()
        for sink in sorted({sink for bucket in self._plan.buckets for sink in bucket.sinks}):
            if sink >= len(sinks):
                raise ConfigError(f"the plan sends to sink {sink} and there are {len(sinks)} sinks")
            self._bells[sink] = self._open_peer(sinks[sink])
        if self._plan.amax_elements:
            for other in sources:
                if other.rank != self._plan.rank:
                    self._peers[other.rank] = (other, self._open_peer(other))
        self._connected = True

    def _open_peer(self, other: Offer) -> Segment:
        """Open a doorbell or an exchange area, which every end that lives keeps until all have connected."""
        try:
            return self._open(other)
        except ConnectError as error:
            what = f"{other.label} was lost before {self.offer.label} connected to it: {error.message}"
            raise PeerLostError(what, hint=error.hint) from error

    @property
    def _plan(self) -> SourceSlice:
        if self._slice is None:
            raise StateError("the transport is not prepared")
        return self._slice

    def begin(self, version: int, deadline: float, cancelled: Cancelled) -> None:
        self._check_connected()
        check_next_version(self.offer.label, self._version, version)
        cancelled()
        self._version = version
        self._sent.clear()
        self._exchanged = False
        self._lease.begin(version)
        self.own.begin(version)

    def address(self, bucket_pos: int) -> int:
        return self.own.address(bucket_pos)

    def exchange_max(self, vector: F32, deadline: float, cancelled: Cancelled) -> None:
        with self._lease.ending_on_error(self._version):
            self._check_connected()
            check_exchange(self._plan, vector, self._exchanged)
            self._exchanged = True
            self._run_exchange(vector, Patience(deadline, cancelled))

    def _run_exchange(self, vector: F32, patience: Patience) -> None:
        pending = dict(self._peers)
        self.own.set_exchange_version(0)
        self.own.exchange()[:] = vector
        self.own.set_exchange_version(self._version)
        for _, segment in pending.values():
            segment.ring()

        def ready() -> bool:
            for rank, (offer, segment) in list(pending.items()):
                if self._merge(vector, offer, segment):
                    del pending[rank]
            return not pending

        def waited_for() -> str:
            labels = ", ".join(offer.label for offer, _ in pending.values())
            return f"{self.offer.label} waited for the exchanged maxima of {labels} in version {self._version}"

        def lost() -> str | None:
            return next((offer.label for offer, segment in pending.values() if not segment.alive()), None)

        self._wait(patience, ready, waited_for, lost)

    def _merge(self, vector: F32, offer: Offer, segment: Segment) -> bool:
        """Take the peer's part, if it is there."""
        if segment.exchange_version() == self._version:
            np.maximum(vector, segment.exchange(), out=vector)
            if segment.exchange_version() == self._version:
                return True
        if segment.current() > self._version:
            raise _moved_on(offer, segment, f"maxima of version {self._version} were exchanged")
        return False

    def send(
        self, bucket_pos: int, digest: int, deadline: float, cancelled: Cancelled, num_bytes: int | None = None
    ) -> None:
        with self._lease.ending_on_error(self._version):
            bells = self._bells  # before the check: `close` takes them away after it makes the check fail
            self._check_connected()
            num_bytes = check_send(self._plan, self._version, self._sent, bucket_pos, num_bytes)
            self.own.publish(bucket_pos, digest, num_bytes)
            self._sent.add(bucket_pos)
            for sink in self._plan.buckets[bucket_pos].sinks:
                bells[sink].ring()

    def flush(self, deadline: float, cancelled: Cancelled) -> None:
        self._lease.end(self._version)
        self._check_connected()

    def lost_sinks(self) -> dict[int, str]:
        """Nobody: sinks read by themselves, and what they fail to read costs this end nothing."""
        return {}

    def close(self) -> None:
        super().close()
        self._bells = {}
        self._peers = {}


class _Feed:
    """What a sink follows of one trainer rank."""

    def __init__(self, offer: Offer, segment: Segment, wanted: dict[int, int]) -> None:
        self.offer = offer
        self.segment = segment
        self.wanted = wanted  # position in the source's staging -> position in the sink's slice
        self.cursor = 0
        self.num_missing = 0


class SegmentSink(SegmentEnd):
    """An engine rank's end; see `wsync.transport.base.SinkEnd`."""

    def __init__(self, kind: SegmentKind) -> None:
        super().__init__(kind)
        self._slice: SinkSlice | None = None
        self._feeds: list[_Feed] = []
        self._addresses: list[int] = []
        self._bytes_done = 0

    def prepare(self, slice_: SinkSlice) -> bytes:
        check_sink_slice(slice_)
        self._slice = slice_
        return self._prepare(
            Offer(
                format_version=OFFER_FORMAT,
                transport=self._kind.name,
                side="sink",
                rank=slice_.sink_idx,
                plan_digest=slice_.plan_digest,
                host=host_identity(),
                bucket_bytes=slice_.bucket_bytes,
                num_openers=len({bucket.src_rank for bucket in slice_.buckets}),
            )
        )

    @property
    def _plan(self) -> SinkSlice:
        if self._slice is None:
            raise StateError("the transport is not prepared")
        return self._slice

    def connect(
        self,
        source_offers: list[bytes],
        sink_offers: list[bytes],
        deadline: float,
        cancelled: Cancelled = never_cancelled,
    ) -> None:
        sources, _ = self._decode(source_offers, sink_offers)
        cancelled()
        wanted: dict[int, dict[int, int]] = {}
        places = {(offer.rank, idx): pos for offer in sources for pos, idx in enumerate(offer.buckets)}
        for pos, bucket in enumerate(self._plan.buckets):
            place = places.get((bucket.src_rank, bucket.bucket_idx))
            if place is None:
                raise PlanMismatchError(
                    f"{self.offer.label} expects bucket {bucket.bucket_idx} from rank {bucket.src_rank},"
                    " which does not offer it"
                )
            wanted.setdefault(bucket.src_rank, {})[place] = pos
        self._addresses = [0] * len(self._plan.buckets)
        for rank, positions in sorted(wanted.items()):
            segment = self._open(sources[rank])
            self._feeds.append(_Feed(sources[rank], segment, positions))
            for place, pos in positions.items():
                self._addresses[pos] = segment.address(place)
        self._connected = True

    def receive(self, version: int, deadline: float, cancelled: Cancelled) -> Iterator[Staged]:
        self._check_connected()
        check_next_version(self.offer.label, self._version, version)
        self._version = version
        self._bytes_done = 0
        self._lease.begin(version)
        for feed in self._feeds:
            feed.cursor, feed.num_missing = 0, len(feed.wanted)
        return self._arrivals(version, Patience(deadline, cancelled))

    def _arrivals(self, version: int, patience: Patience) -> Iterator[Staged]:
        pending = list(self._feeds)
        arrived: list[Staged] = []

        def ready() -> bool:
            for feed in pending:
                self._take(feed, version, arrived)
            return bool(arrived)

        def waited_for() -> str:
            return self._progress(version)

        def lost() -> str | None:
            return next((feed.offer.label for feed in pending if not feed.segment.alive()), None)

        complete = False
        try:
            while pending:
                self._wait(patience, ready, waited_for, lost)
                pending = [feed for feed in pending if feed.num_missing]
                for staged in arrived:
                    patience.check(waited_for)
                    yield staged
                arrived.clear()
            complete = True
        finally:
            if not complete:
                self._lease.end(version)

    def _take(self, feed: _Feed, version: int, arrived: list[Staged]) -> None:
        """Append what the source published since the last look."""
        while feed.num_missing:
            item = feed.segment.take(feed.cursor, version)
            if item is None:
                if feed.segment.current() > version:
                    raise _moved_on(feed.offer, feed.segment, self._progress(version))
                return
            feed.cursor += 1
            pos = feed.wanted.get(item[0])
            if pos is not None:
                feed.num_missing -= 1
                if not 0 < item[2] <= self._plan.buckets[pos].used_bytes:
                    raise TransportError(f"{feed.offer.label} says {item[2]} bytes: {self._progress(version)}")
                self._bytes_done += item[2]
                arrived.append(Staged(pos, self._addresses[pos], item[1], item[2]))

    def _progress(self, version: int) -> str:
        missing = [f"{feed.num_missing} of {feed.offer.label}" for feed in self._feeds if feed.num_missing]
        total = len(self._plan.buckets)
        num_done = total - sum(feed.num_missing for feed in self._feeds)
        return (
            f"{self.offer.label} had {num_done} of {total} buckets of version {version} ({self._bytes_done} bytes)"
            f" and missed {', '.join(missing) or 'none'}"
        )

    def still_valid(self, version: int) -> bool:
        return (
            self._connected
            and version == self._version
            and all(feed.segment.current() == version for feed in self._feeds)
        )

    def release(self, version: int) -> None:
        """Nothing to give back but the lease: the session tells the sources when they may begin again."""
        self._lease.end(version)

    def close(self) -> None:
        super().close()
        self._feeds = []


def _moved_on(offer: Offer, segment: Segment, what: str) -> TransportError:
    return TransportError(f"{offer.label} went on to version {segment.current()} while {what}")
