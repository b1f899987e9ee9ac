"""Transport between any hosts over gloo (TCP), as torch ships it; plaintext inside the cluster.

A bucket is one message. Sources send in order of packing, sinks post receives for the whole version ahead and relay
along the bucket's hops. Neither side touches the default process group.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wsync.errors import ConfigError, StateError, TransportError, WsyncError
from wsync.plan.types import ALIGNMENT, SOURCE, Bucket, SinkSlice, SourceSlice
from wsync.transport.base import Cancelled, Staged
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
from wsync.transport.gloo_mesh import TRAILER_BYTES, Mesh, Message, Transfer
from wsync.transport.offers import OFFER_FORMAT, Offer, decode_offers, encode_offer, host_identity
from wsync.transport.waiting import Patience

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
            Message(self._staging.view(pos, bucket.used_bytes + TRAILER_BYTES))
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

    def _connect(self, source_offers: list[bytes], sink_offers: list[bytes], deadline: float) -> Mesh:
        if self._offer is None or self._staging is None:
            raise StateError("the transport is not prepared, or closed")
        if self._mesh is not None:
            raise StateError(f"{self._offer.label} was connected twice")
        sources, sinks = decode_offers(self._offer, source_offers, sink_offers)
        self._num_sources = len(sources)
        self._check_peers(sources, sinks)
        self._mesh = connect_mesh(self._offer, sources, sinks, self._sockets, deadline)
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
        return self._staging.address(bucket_pos)

    def close(self) -> None:
        """Give everything back; see `SourceEnd.close`."""
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            mesh.close()
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
        self._messages = []
        if self._staging is not None:
            self._staging.close()
            self._staging = None


class GlooSource(_GlooEnd):
    """A trainer rank's end; see `wsync.transport.base.SourceEnd`."""

    def __init__(self, address: str | None = None) -> None:
        """``address``: under which other hosts reach this process; found out where not given."""
        super().__init__(address)
        self._slice: SourceSlice | None = None
        self._exchange: Exchange | None = None
        self._outgoing: list[tuple[int, Transfer]] = []  # bucket position, transfer
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

    def connect(self, source_offers: list[bytes], sink_offers: list[bytes], deadline: float) -> None:
        mesh = self._connect(source_offers, sink_offers, deadline)
        if self._plan.amax_elements:
            self._exchange = Exchange(mesh, self._plan.rank, self._num_sources, self._plan.amax_elements)

    def _check_peers(self, sources: list[Offer], sinks: list[Offer]) -> None:
        for bucket in self._plan.buckets:
            if bucket.sinks and max(bucket.sinks) >= len(sinks):
                raise ConfigError(f"the plan sends to sink {max(bucket.sinks)} and there are {len(sinks)} sinks")

    def begin(self, version: int, deadline: float, cancelled: Cancelled) -> None:
        mesh = self._connected
        check_next_version(self._label, self._version, version)
        # What a failed version left under way still reads staging: it drains while the sinks receive again.
        self._wait_sent(mesh, Patience(deadline, cancelled))
        self._version = version
        self._sent.clear()
        self._exchanged = False

    def exchange_max(self, vector: npt.NDArray[np.float32], deadline: float, cancelled: Cancelled) -> None:
        self._connected  # noqa: B018  raises where closed
        check_exchange(self._plan, vector, self._exchanged)
        self._exchanged = True
        if self._exchange is not None:
            self._exchange.run(vector, self._version, Patience(deadline, cancelled))

    def send(self, bucket_pos: int, digest: int, deadline: float, cancelled: Cancelled) -> None:
        mesh = self._connected
        check_send(self._plan, self._version, self._sent, bucket_pos)
        Patience(deadline, cancelled).check(lambda: f"{self._label} sent {len(self._sent)} buckets")
        self._sent.add(bucket_pos)
        bucket = self._plan.buckets[bucket_pos]
        message = self._messages[bucket_pos]
        message.seal(self._version, digest)
        for src, sink in bucket.hops:
            if src == SOURCE:
                transfer = mesh.post_send(self._num_sources + sink, bucket.bucket_idx, message)
                self._outgoing.append((bucket_pos, transfer))
        for pos, transfer in self._outgoing:
            if transfer.error:
                mesh.check(transfer, self._progress(pos))

    def flush(self, deadline: float, cancelled: Cancelled) -> None:
        self._wait_sent(self._connected, Patience(deadline, cancelled))

    def _wait_sent(self, mesh: Mesh, patience: Patience) -> None:
        for pos, transfer in self._outgoing:
            subject = functools.partial(self._progress, pos)
            mesh.wait_for(transfer, patience, subject)
        self._outgoing.clear()

    def _progress(self, bucket_pos: int) -> str:
        sizes = [(self._messages[pos].num_bytes, transfer) for pos, transfer in self._outgoing]
        done = sum(size for size, transfer in sizes if transfer.finished and not transfer.error)
        return (
            f"{self._label} had {done} of {sum(size for size, _ in sizes)} bytes of version {self._version} sent"
            f" and was at bucket {self._plan.buckets[bucket_pos].bucket_idx}"
        )

    def close(self) -> None:
        super().close()
        self._outgoing.clear()
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
        self._relays: dict[int, list[Transfer]] = {}
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

    def connect(self, source_offers: list[bytes], sink_offers: list[bytes], deadline: float) -> None:
        self._connect(source_offers, sink_offers, deadline)
        self._positions = {bucket.bucket_idx: pos for pos, bucket in enumerate(self._plan.buckets)}
        self._feeders = [self._feeder(bucket) for bucket in self._plan.buckets]

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
        mesh = self._connected
        check_next_version(self._label, self._version, version)
        self._version = version
        self._num_done = 0
        self._bytes_done = 0
        self._healthy = False
        # What a failed version left posted stays so: the next message of that stream arrives there.
        unposted = [pos for pos, message in enumerate(self._messages) if message.transfer is None]
        unposted = [pos for pos in unposted if not self._post(mesh, pos)]
        return self._arrivals(mesh, version, unposted, Patience(deadline, cancelled))

    def _arrivals(self, mesh: Mesh, version: int, unposted: list[int], patience: Patience) -> Iterator[Staged]:

        def ready() -> bool:
            return bool(self._inbox) or any(self._is_free(pos) for pos in unposted)

        while self._num_done < len(self._messages):
            mesh.wait(ready, patience, self._progress)
            unposted[:] = [pos for pos in unposted if not self._post(mesh, pos)]
            while self._inbox:
                transfer = self._inbox.popleft()
                pos = self._positions[transfer.key]
                message = self._messages[pos]
                message.transfer = None
                mesh.check(transfer, self._progress())
                if message.version < version:
                    unposted.append(pos)
                    continue
                if message.version > version:
                    raise TransportError(
                        f"{mesh.label(transfer.peer)} went on to version {message.version}: {self._progress()}"
                    )
                self._relay(mesh, pos)
                self._num_done += 1
                self._bytes_done += message.num_bytes
                patience.check(self._progress)
                yield Staged(bucket_pos=pos, address=self.address(pos), digest=message.digest)
        self._healthy = True

    def _is_free(self, pos: int) -> bool:
        """Whether nobody reads the bucket any more on behalf of another sink."""
        return all(transfer.finished for transfer in self._relays.get(pos, ()))

    def _post(self, mesh: Mesh, pos: int) -> bool:
        if not self._is_free(pos):
            return False
        self._relays.pop(pos, None)
        bucket = self._plan.buckets[pos]
        mesh.post_receive(self._feeders[pos], bucket.bucket_idx, self._messages[pos], self._inbox)
        return True

    def _relay(self, mesh: Mesh, pos: int) -> None:
        """Pass the bucket on. A lost receiver is its own replica's failure, not this one's."""
        bucket = self._plan.buckets[pos]
        targets = [dst for src, dst in bucket.hops if src == self._plan.sink_idx]
        if targets:
            self._relays[pos] = [
                mesh.post_send(self._num_sources + dst, bucket.bucket_idx, self._messages[pos]) for dst in targets
            ]

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
        """Nothing to give back: the next `receive` overwrites."""

    def close(self) -> None:
        mesh = self._mesh
        if mesh is not None and self._healthy:
            try:
                mesh.wait(
                    lambda: all(self._is_free(pos) for pos in self._relays),
                    Patience.for_seconds(_RELAY_GRACE_S),
                    lambda: f"{self._label} relayed",
                )
            except WsyncError:
                self._healthy = False
        super().close()
        self._inbox.clear()
        self._relays.clear()
