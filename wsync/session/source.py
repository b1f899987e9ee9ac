"""A trainer rank: joins, and for each publish replays its program. Knows addresses and slices, no framework.

Threads: `publish` returns at once; a worker thread packs and sends. Between `publish` and *released* the described
memory must not change. One publish is in flight at a time: a newer one supersedes what is not yet committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from wsync import kernels
from wsync.errors import (
    CommitError,
    NonFiniteError,
    PeerLostError,
    PlanMismatchError,
    StateError,
    TransportError,
    WsyncError,
)
from wsync.plan import CompactSlice, expand_source
from wsync.plan.program import ShardMemory, SourceProgram, compile_source
from wsync.plan.types import SourceSlice
from wsync.session.channel import Channel
from wsync.session.clock import Stopwatch, deadline_after, remaining
from wsync.session.delta import DeltaSender
from wsync.session.messages import (
    Accepted,
    Begin,
    Connect,
    Failed,
    Fault,
    Finished,
    Flushed,
    Offer,
    Packed,
    Progress,
    PublishRequest,
    Ready,
    Rejoin,
    Sent,
    Setup,
    SourceJoin,
    ToClient,
)
from wsync.session.publication import GRACE_S, Publication
from wsync.session.report import build_report
from wsync.spec.manifest import SourceRankManifest
from wsync.spec.serde import FORMAT_VERSION, decode
from wsync.transport import SourceEnd

_CLOSE_S = 5.0


class SourceSession:
    """Joins the store and publishes.

    Args:
        channel: to the coordinator.
        manifest: what this rank holds.
        memory: where, in the manifest's order.
        open_transport: makes this rank's end of the transport of that name.
        num_threads: of the pack kernels.
        keepalive: what owns the memory; held as long as a worker may read it.
        second_read: read everything twice before it is released, and compare.
        delta: whether this rank expects that publishes may be deltas; must be what the coordinator says.

    Raises:
        WsyncError: the ranks do not fit together, or the deadline passed.
    """

    def __init__(
        self,
        channel: Channel,
        manifest: SourceRankManifest,
        memory: Sequence[Sequence[ShardMemory]],
        open_transport: Callable[[str], SourceEnd],
        *,
        transport: str,
        num_threads: int,
        join_deadline_s: float,
        keepalive: object = None,
        second_read: bool = False,
        delta: bool = False,
    ) -> None:
        self._channel = channel
        self._keepalive = keepalive
        self._second_read = second_read
        self._scratch = np.empty(0, np.uint8)
        self._own_amaxes = np.empty(0, np.float32)
        self._delta: DeltaSender | None = None
        self._manifest = manifest
        self._memory = memory
        self._open_transport = open_transport
        self._num_threads = num_threads
        self._slice: SourceSlice | None = None
        self._program: SourceProgram | None = None
        self._end: SourceEnd | None = None
        self._finished: Finished | None = None
        self._epoch = 0
        self._seq = 0
        self._last_version: int | None = None
        self._closing = False
        self._worker: threading.Thread | None = None
        self._publication: Publication | None = None
        self._current: Publication | None = None
        self._watch = Stopwatch()
        deadline = deadline_after(join_deadline_s)
        channel.send(SourceJoin(FORMAT_VERSION, transport, manifest, delta))
        self._incarnation = self._await_acceptance(deadline)

    def _await_acceptance(self, deadline: float) -> int:
        while True:
            message = self._channel.recv(deadline, f"all {self._manifest.world_size} trainer ranks to join")
            if isinstance(message, Accepted):
                return message.incarnation

    @property
    def last_version(self) -> int | None:
        """The last version that some replica may hold, or that is under way."""
        publication = self._publication
        if publication is None or not publication.left_no_trace:
            return publication.version if publication else self._last_version
        return self._last_version

    def publish(
        self, version: int, min_replicas: int, deadline_s: float, check_unwritten: Callable[[], None] = lambda: None
    ) -> Publication:
        """Start a publish. See `wsync.Source.publish`.

        ``check_unwritten`` raises where the memory was written since.
        """
        previous = self._publication
        if previous is not None and not previous.released:
            raise StateError(
                f"publish(version={version}) while version {previous.version} is not released",
                hint="call wait_released() first",
            )
        self._last_version = self.last_version
        publication = Publication(version, self._seq + 1, deadline_s, check_unwritten)
        self._channel.send(PublishRequest(publication.seq, version, min_replicas, deadline_s))
        self._seq = publication.seq
        worker = self._worker
        self._publication = publication
        self._worker = threading.Thread(
            target=self._run, args=(publication, worker), name=f"wsync-publish-{version}", daemon=True
        )
        self._worker.start()
        return publication

    def close(self) -> None:
        """Leave. A publish in flight fails; a bucket that is being packed is finished first. May be called twice."""
        self._closing = True
        self._channel.close()
        if self._worker is not None:
            self._worker.join(timeout=_CLOSE_S)
            if self._worker.is_alive():
                return  # it still reads and writes: it closes the transport itself when it is done
        self._close_end()

    def _close_end(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()

    # ---- the worker thread

    def _run(self, publication: Publication, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        deadline = publication.deadline + GRACE_S
        try:
            finished = self._serve(publication, deadline)
            error = finished.fault.to_error() if finished.fault else None
            if isinstance(error, CommitError):
                error.replicas = dict(finished.replicas)
            stall_s = max(0.0, publication.released_s - publication.began_s)
            total_s = time.monotonic() - publication.began_s
            publication.finish(build_report(publication.version, finished, total_s, stall_s), error)
        except WsyncError as e:
            publication.finish(None, e)
        except Exception as e:  # the user waits on the publication: it must learn of every error
            publication.finish(None, WsyncError(f"publish failed: {type(e).__name__}: {e}"))
        finally:
            if self._closing:
                self._close_end()

    def _serve(self, publication: Publication, deadline: float) -> Finished:
        self._finished = None
        self._current = publication
        what = f"version {publication.version} to be over"
        while self._finished is None:
            message = self._channel.recv(deadline, what)
            seq = 0
            if isinstance(message, Rejoin):
                self._check_incarnation(message)
                continue
            try:
                if isinstance(message, Setup):
                    self._epoch = message.epoch
                    self._setup(message)
                elif isinstance(message, Connect):
                    self._connect(message, publication)
                elif isinstance(message, Begin):
                    seq = message.seq
                    self._replay(message, publication)
                else:
                    self._take(message, publication)
            except Exception as e:  # every rank must learn of it
                if self._finished is None:
                    self._channel.send(Failed(seq, self._epoch, Fault.of(e)))
        return self._finished

    def _take(self, message: ToClient, publication: Publication) -> None:
        if isinstance(message, Finished) and message.seq == publication.seq:
            self._finished = message
        elif isinstance(message, Progress) and message.seq == publication.seq:
            publication.progressed(message)

    def _check_incarnation(self, message: Rejoin) -> None:
        if message.incarnation != self._incarnation:
            raise PeerLostError(
                f"trainer rank 0 restarted: incarnation {self._incarnation} is gone, {message.incarnation} is there",
                hint="make a new Source on every trainer rank",
            )

    def _setup_cancelled(self) -> None:
        """While this rank connects: the publish may be over, or the coordinator may plan anew."""
        message = self._channel.poll()
        if isinstance(message, Setup):
            self._channel.unread(message)
            raise TransportError(f"epoch {self._epoch} was given up for epoch {message.epoch}")
        if message is not None and self._current is not None:
            self._take(message, self._current)
        if self._finished is not None:
            raise StateError(f"publish {self._finished.seq} ended while this rank connected")

    def _cancelled(self) -> None:
        while self._finished is None and (message := self._channel.poll()) is not None:
            if self._current is not None:
                self._take(message, self._current)
        if self._finished is not None:
            fault = self._finished.fault
            raise fault.to_error() if fault else CommitError(f"round {self._finished.seq} ended while it was sent")

    def _setup(self, message: Setup) -> None:
        if self._end is not None:
            self._end.close()
        self._slice = expand_source(decode(message.slice_, CompactSlice))
        if self._slice.plan_digest != message.plan_digest:
            raise PlanMismatchError(f"a slice of plan {self._slice.plan_digest} came with plan {message.plan_digest}")
        self._program = compile_source(self._slice, self._manifest.tensors, self._memory)
        self._delta = DeltaSender(self._slice, self._num_threads) if message.delta else None
        if self._second_read:
            self._scratch = np.empty(self._slice.bucket_bytes, np.uint8)
        self._end = self._open_transport(message.transport)
        offer = self._end.prepare(self._slice, message.num_sources)
        self._channel.send(Offer(message.epoch, message.plan_digest, offer))

    def _connect(self, message: Connect, publication: Publication) -> None:
        if self._end is None or self._slice is None or message.epoch != self._epoch:
            raise StateError(f"Connect of epoch {message.epoch} came in epoch {self._epoch}")
        deadline = min(publication.deadline, self._channel.arrived_s + message.deadline_s)
        self._end.connect(list(message.source_offers), list(message.sink_offers), deadline, self._setup_cancelled)
        self._channel.send(Ready(message.epoch, self._slice.plan_digest))

    def _replay(self, begin: Begin, publication: Publication) -> None:
        if self._end is None or self._slice is None or self._program is None:
            raise StateError("Begin came before Setup")
        if begin.seq != publication.seq:
            return  # a publish that this rank gave up: the coordinator ends it without this rank
        publication.takes_part(begin.replicas)
        if begin.plan_digest != self._slice.plan_digest:
            raise PlanMismatchError(
                f"trainer rank {self._slice.rank} holds plan {self._slice.plan_digest}, "
                f"the publish is of {begin.plan_digest}"
            )
        deadline = time.monotonic() + remaining(publication.deadline, f"version {begin.version}")
        self._watch.take()
        self._end.begin(begin.seq, deadline, self._cancelled)
        if self._slice.amax_elements:
            self._reduce(deadline)
        with self._watch.phase("pack"):
            digests = self._pack_and_send(begin, deadline)
        if self._second_read:
            with self._watch.phase("second read"):
                self._read_again(digests)
        publication.mark_released()
        sent = self._delta.finish() if self._delta is not None else Sent()
        self._channel.send(Packed(begin.seq, self._watch.take(), sent))
        with self._watch.phase("flush"):
            self._end.flush(deadline, self._cancelled)
        self._channel.send(Flushed(begin.seq, self._watch.take(), self._end.lost_sinks()))

    def _reduce(self, deadline: float) -> None:
        """Amaxes of scale blocks that a shard's edge cuts: one vector, one reduction."""
        program, end = self._program, self._end
        if program is None or end is None:
            return
        with self._watch.phase("amax"):
            program.amax_vector.fill(0)
            bad = kernels.amax(program.amax_descs, self._num_threads)
            if bad is not None:
                raise self._non_finite(*program.locate_amax(*bad))
            if self._second_read:
                self._own_amaxes = program.amax_vector.copy()
            end.exchange_max(program.amax_vector, deadline, self._cancelled)
            kernels.scales_from_amax(program.amax_descs)

    def _pack_and_send(self, begin: Begin, deadline: float) -> list[int]:
        program, end, delta = self._program, self._end, self._delta
        digests: list[int] = []
        if program is None or end is None:
            return digests
        if delta is not None:
            delta.begin(begin.seq, begin.base_seq)
        for pos, descs in enumerate(program.buckets):
            address = end.address(pos)
            target = address if delta is None else delta.scratch(pos)
            digest, bad = kernels.pack(descs, target, self._num_threads)
            if bad is not None:
                raise self._non_finite(*program.locate(pos, *bad))
            whole = (digest + program.padding_digests[pos]) % 2**64
            num_bytes = None if delta is None else delta.fill(pos, address, whole)
            end.send(pos, whole, deadline, self._cancelled, num_bytes)
            self._cancelled()
            digests.append(digest)
        return digests

    def _read_again(self, digests: Sequence[int]) -> None:
        """Pack everything once more, into scratch memory: what was written meanwhile has another digest."""
        if self._program is None:
            return
        for pos, descs in enumerate(self._program.buckets):
            again, bad = kernels.pack(descs, self._scratch.ctypes.data, self._num_threads)
            if bad is not None or again != digests[pos]:
                name, index = self._program.locate(pos, *(bad or (0, 0)))
                where = f"at index {index} of {name!r}" if bad else f"in the bucket that begins with {name!r}"
                raise StateError(
                    f"weights were written {where} while they were read for a publish: digest {digests[pos]:016x} "
                    f"when they were packed, {again:016x} when they were read again",
                    hint="call Publication.wait_released() before the optimizer's next step",
                )
            self._cancelled()
        if self._program.slice_.amax_elements:
            self._read_amaxes_again(self._program)

    def _read_amaxes_again(self, program: SourceProgram) -> None:
        """What is written between the amaxes and the packing is packed alike twice, with scales of other values."""
        program.amax_vector.fill(0)  # packing is over
        bad = kernels.amax(program.amax_descs, self._num_threads)
        changed = np.flatnonzero(program.amax_vector != self._own_amaxes)
        if bad is None and not len(changed):
            return
        name = program.locate_amax(*bad)[0] if bad is not None else program.name_of_amax(int(changed[0]))
        raise StateError(
            f"weights of {name!r} were written while they were read for a publish: their largest magnitudes changed",
            hint="call Publication.wait_released() before the optimizer's next step",
        )

    def _non_finite(self, name: str, index: tuple[int, ...]) -> NonFiniteError:
        return NonFiniteError(f"tensor {name!r} is not finite at index {index} (trainer rank {self._manifest.rank})")
