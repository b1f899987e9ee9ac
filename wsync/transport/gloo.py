"""Transport between any hosts over gloo (TCP), as torch ships it; plaintext inside the cluster.

A bucket is one message. Sources send in order of packing, sinks post receives for the whole version ahead and relay
along the bucket's hops. Neither side touches the default process group.

A sink that fails is one of its source's `lost_sinks` and nothing more, and so is one that still has not taken what was
sent to it when the next version begins. A message that gloo was given cannot be taken back: should such a sink read on,
it finds bytes of two versions, and their digest does not fit. For sinks that relay see `wsync.transport.gloo_relays`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wsync.errors import ConfigError, StateError, TransportError, WsyncError
from wsync.plan.types import ALIGNMENT, SOURCE, Bucket, SinkSlice, SourceSlice
from wsync.transport.base import Cancelled, Staged, never_cancelled
from wsync.transport.buffers import Staging
from wsync.transport.checks import (
    check_exchange,
    check_hops,
    check_next_version,
    check_send,
    check_sink_slice,
    check_source_slice,
)
from wsync.transport.gloo_connect import StoreSockets, connect_mesh, own_address
from wsync.transport.gloo_exchange import Exchange
from wsync.transport.gloo_mesh import HEADER_BYTES, Mesh, Message, Transfer
from wsync.transport.gloo_outbox import Outbox
from wsync.transport.gloo_relays import Relays
from wsync.transport.lifetime import Lease
from wsync.transport.offers import OFFER_FORMAT, Offer, decode_offers, encode_offer, host_identity
from wsync.transport.waiting import Patience, remaining_s

_STALL_S = 5.0
"""How long `begin` waits, while nothing moves, for sinks to take what a failed version left under way.

Never more than a quarter of the time there is.
"""

_RELAY_GRACE_S = 2.0
"""How long a sink that closes lets relays under way finish."""


class _GlooEnd(ABC):
    """What both ends share: staging with a message per bucket, the mesh, offers."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._staging: Staging | None = None
        self._messages: list[Message] = []
        self._mesh: Mesh | None = None
        self._offer: Offer | None = None
        self._sockets: StoreSockets | None = None
        self._num_sources = 0
        self._version = 0
        self._lease = Lease()

    def _prepare(self, side: str, rank: int, slice_: SourceSlice | SinkSlice, exchange_elements: int) -> bytes:
        if self._offer is not None:
            raise StateError(f"{self._offer.label} was prepared twice")
        for bucket in slice_.buckets:
            check_hops(bucket)
        address = self._address or own_address()
        if side == "source" and rank == 0:
            self._sockets = StoreSockets(address)
        self._staging = Staging(len(slice_.buckets), slice_.bucket_bytes + ALIGNMENT)
        self._messages = [
            Message(self._staging.view(pos, HEADER_BYTES + bucket.used_bytes, ALIGNMENT - HEADER_BYTES))
            for pos, bucket in enumerate(slice_.buckets)
        ]
        self._offer = Offer(
            format_version=OFFER_FORMAT,
            transport="gloo",
            side=side,
            rank=rank,
            plan_digest=slice_.plan_digest,
            host=host_identity(),
            bucket_bytes=slice_.bucket_bytes,
            buckets=tuple(bucket.bucket_idx for bucket in slice_.buckets) if side == "source" else (),
            exchange_elements=exchange_elements,
            addresses=self._sockets.addresses if self._sockets else ((address, 0),),
        )
        return encode_offer(self._offer)

    def _connect(
        self, source_offers: list[bytes], sink_offers: list[bytes], deadline: float, cancelled: Cancelled
    ) -> Mesh:
        if self._offer is None or self._staging is None:
            raise StateError("the transport is not prepared, or closed")
        if self._mesh is not None:
            raise StateError(f"{self._offer.label} was connected twice")
        sources, sinks = decode_offers(self._offer, source_offers, sink_offers)
        self._num_sources = len(sources)
        self._check_peers(sources, sinks)
        self._mesh = connect_mesh(self._offer, sources, sinks, self._sockets, deadline, cancelled)
        return self._mesh

    @abstractmethod
    def _check_peers(self, sources: list[Offer], sinks: list[Offer]) -> None:
        """Refuse offers that do not fit the slice."""

    @property
    def _connected(self) -> Mesh:
        if self._mesh is None:
            raise StateError("the transport is not connected, or closed")
        return self._mesh

    @property
    def _label(self) -> str:
        return self._offer.label if self._offer is not None else "an end that is not prepared"

    def address(self, bucket_pos: int) -> int:
        """Address of the bucket's first byte in this end's staging."""
        if self._staging is None or not 0 <= bucket_pos < len(self._messages):
            raise ConfigError(f"{self._label} has no bucket position {bucket_pos} of {len(self._messages)}")
        return self._staging.address(bucket_pos) + ALIGNMENT

    def close(self) -> None:
        """Give everything back; see `SourceEnd.close`. While a version is under way, the lease keeps its staging."""
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            mesh.close()
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
        self._lease.keep(self._messages)  # they hold the memory
        self._messages = []
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()


class GlooSource(_GlooEnd):
    """A trainer rank's end; see `wsync.transport.base.SourceEnd`."""

    def __init__(self, address: str | None = None) -> None:
        """``address``: under which other hosts reach this process; found out where not given."""
        super().__init__(address)
        self._slice: SourceSlice | None = None
        self._exchange: Exchange | None = None
        self._outbox: Outbox | None = None
        self._lost: dict[int, str] = {}
        self._sent: set[int] = set()
        self._exchanged = False

    @property
    def _plan(self) -> SourceSlice:
        if self._slice is None:
            raise StateError("the transport is not prepared")
        return self._slice

    def prepare(self, slice_: SourceSlice, num_sources: int) -> bytes:
        check_source_slice(slice_, num_sources)
        self._slice = slice_
        return self._prepare("source", slice_.rank, slice_, slice_.amax_elements)

    def connect(
        self,
        source_offers: list[bytes],
        sink_offers: list[bytes],
        deadline: float,
        cancelled: Cancelled = never_cancelled,
    ) -> None:
        mesh = self._connect(source_offers, sink_offers, deadline, cancelled)
        if self._plan.amax_elements:
            self._exchange = Exchange(mesh, self._plan.rank, self._num_sources, self._plan.amax_elements)
        sinks = {dst for bucket in self._plan.buckets for src, dst in bucket.hops if src == SOURCE}
        self._outbox = Outbox(mesh, self._label, self._num_sources, sinks, self._lost)

    def _check_peers(self, sources: list[Offer], sinks: list[Offer]) -> None:
        for bucket in self._plan.buckets:
            if bucket.sinks and max(bucket.sinks) >= len(sinks):
                raise ConfigError(f"the plan sends to sink {max(bucket.sinks)} and there are {len(sinks)} sinks")

    @property
    def _sending(self) -> Outbox:
        if self._outbox is None:
            raise StateError("the transport is not connected, or closed")
        return self._outbox

    def begin(self, version: int, deadline: float, cancelled: Cancelled) -> None:
        outbox = self._sending
        check_next_version(self._label, self._version, version)
        # What a failed version left under way still reads staging: it drains while the sinks receive again.
        outbox.drain(Patience(deadline, cancelled), min(_STALL_S, remaining_s(deadline) / 4))
        outbox.begin(version)
        self._version = version
        self._sent.clear()
        self._exchanged = False
        self._lease.begin(version)

    def exchange_max(self, vector: npt.NDArray[np.float32], deadline: float, cancelled: Cancelled) -> None:
        with self._lease.ending_on_error(self._version):
            self._connected  # noqa: B018  raises where closed
            check_exchange(self._plan, vector, self._exchanged)
            self._exchanged = True
            if self._exchange is not None:
                self._exchange.run(vector, self._version, Patience(deadline, cancelled))

    def send(
        self, bucket_pos: int, digest: int, deadline: float, cancelled: Cancelled, num_bytes: int | None = None
    ) -> None:
        with self._lease.ending_on_error(self._version):
            messages = self._messages  # before the check: `close` takes them away after it makes the check fail
            outbox = self._sending
            num_bytes = check_send(self._plan, self._version, self._sent, bucket_pos, num_bytes)
            Patience(deadline, cancelled).check(outbox.progress)
            self._sent.add(bucket_pos)
            bucket, message = self._plan.buckets[bucket_pos], messages[bucket_pos]
            message.seal(self._version, digest, num_bytes)
            for src, sink in bucket.hops:
                if src == SOURCE:
                    outbox.post(sink, bucket.bucket_idx, message)
            outbox.reap()

    def flush(self, deadline: float, cancelled: Cancelled) -> None:
        with self._lease.ending_on_error(self._version):
            self._sending.wait(Patience(deadline, cancelled))
            self._lease.end(self._version)

    def lost_sinks(self) -> dict[int, str]:
        if self._outbox is not None:
            self._outbox.reap()
        return dict(self._lost)

    def close(self) -> None:
        self._outbox = None
        super().close()
        self._exchange = None


class GlooSink(_GlooEnd):
    """An engine rank's end; see `wsync.transport.base.SinkEnd`."""

    def __init__(self, address: str | None = None) -> None:
        """``address``: under which other hosts reach this process; found out where not given."""
        super().__init__(address)
        self._slice: SinkSlice | None = None
        self._positions: dict[int, int] = {}  # bucket_idx -> position
        self._feeders: list[int] = []  # mesh index of who sends each bucket
        self._inbox: deque[Transfer] = deque()
        self._relays: Relays | None = None
        self._num_done = 0
        self._bytes_done = 0
        self._healthy = True

    @property
    def _plan(self) -> SinkSlice:
        if self._slice is None:
            raise StateError("the transport is not prepared")
        return self._slice

    def prepare(self, slice_: SinkSlice) -> bytes:
        check_sink_slice(slice_)
        self._slice = slice_
        return self._prepare("sink", slice_.sink_idx, slice_, 0)

    def connect(
        self,
        source_offers: list[bytes],
        sink_offers: list[bytes],
        deadline: float,
        cancelled: Cancelled = never_cancelled,
    ) -> None:
        mesh = self._connect(source_offers, sink_offers, deadline, cancelled)
        buckets = self._plan.buckets
        self._positions = {bucket.bucket_idx: pos for pos, bucket in enumerate(buckets)}
        self._feeders = [self._feeder(bucket) for bucket in buckets]
        self._relays = Relays(mesh, self._plan.sink_idx, self._num_sources, buckets, self._messages)

    def _feeder(self, bucket: Bucket) -> int:
        feeder = next(src for src, dst in bucket.hops if dst == self._plan.sink_idx)
        return bucket.src_rank if feeder == SOURCE else self._num_sources + feeder

    def _check_peers(self, sources: list[Offer], sinks: list[Offer]) -> None:
        offered = {(offer.rank, idx) for offer in sources for idx in offer.buckets}
        for bucket in self._plan.buckets:
            if (bucket.src_rank, bucket.bucket_idx) not in offered:
                raise ConfigError(
                    f"{self._label} expects bucket {bucket.bucket_idx} from rank {bucket.src_rank},"
                    " which does not offer it"
                )

    def receive(self, version: int, deadline: float, cancelled: Cancelled) -> Iterator[Staged]:
        mesh, relays = self._connected, self._relays
        if relays is None:
            raise StateError("the transport is not connected, or closed")
        check_next_version(self._label, self._version, version)
        self._version = version
        self._num_done = 0
        self._bytes_done = 0
        self._healthy = False
        self._lease.begin(version)
        relays.begin()
        # What a failed version left posted stays so: the next message of that stream arrives there.
        unposted = [pos for pos, message in enumerate(self._messages) if message.transfer is None]
        unposted = [pos for pos in unposted if not self._post(mesh, relays, pos)]
        return self._guarded(mesh, relays, version, unposted, Patience(deadline, cancelled))

    def _guarded(
        self, mesh: Mesh, relays: Relays, version: int, unposted: list[int], patience: Patience
    ) -> Iterator[Staged]:
        complete = False
        try:
            yield from self._arrivals(mesh, relays, unposted, patience)
            complete = True
        finally:
            if not complete:
                self._lease.end(version)
                relays.give_up(version)
        self._healthy = True

    def _arrivals(self, mesh: Mesh, relays: Relays, unposted: list[int], patience: Patience) -> Iterator[Staged]:
        version, messages, num_done = self._version, self._messages, 0

        def ready() -> bool:
            return bool(self._inbox) or relays.has_notes or any(relays.is_free(pos) for pos in unposted)

        while num_done < len(messages):
            mesh.wait(ready, patience, self._progress)
            unposted[:] = [pos for pos in unposted if not self._post(mesh, relays, pos)]
            while self._inbox:
                transfer = self._inbox.popleft()
                pos = self._positions[transfer.key]
                message = messages[pos]
                message.transfer = None
                mesh.check(transfer, self._progress())
                if message.version < version:
                    unposted.append(pos)
                    continue
                if message.version > version:
                    raise TransportError(
                        f"{mesh.label(transfer.peer)} went on to version {message.version}: {self._progress()}"
                    )
                if not 0 < message.num_bytes <= message.capacity:
                    raise TransportError(
                        f"{mesh.label(transfer.peer)} says {message.num_bytes} bytes: {self._progress()}"
                    )
                relays.pass_on(pos)
                num_done += 1
                self._num_done = num_done
                self._bytes_done += message.num_bytes
                patience.check(self._progress)
                yield Staged(pos, self.address(pos), message.digest, message.num_bytes)
            relays.check_notes(version, self._progress())

    def _post(self, mesh: Mesh, relays: Relays, pos: int) -> bool:
        if not relays.is_free(pos):
            return False
        relays.forget(pos)
        mesh.post_receive(self._feeders[pos], self._plan.buckets[pos].bucket_idx, self._messages[pos], self._inbox)
        return True

    def _progress(self) -> str:
        mesh = self._mesh
        missing = sorted({self._feeders[pos] for pos, message in enumerate(self._messages) if message.transfer})
        labels = ", ".join(mesh.label(peer) for peer in missing) if mesh is not None else ""
        total = len(self._messages)
        return (
            f"{self._label} had {self._num_done} of {total} buckets of version {self._version}"
            f" ({self._bytes_done} bytes) and missed some of {labels}"
        )

    def still_valid(self, version: int) -> bool:
        return self._mesh is not None and version == self._version

    def release(self, version: int) -> None:
        """Nothing to give back but the lease: the next `receive` overwrites."""
        self._lease.end(version)

    def close(self) -> None:
        mesh, relays = self._mesh, self._relays
        if mesh is not None and relays is not None and self._healthy:
            try:
                mesh.wait(relays.all_free, Patience.for_seconds(_RELAY_GRACE_S), lambda: f"{self._label} relayed")
            except WsyncError:
                self._healthy = False
        super().close()
        self._relays = None
