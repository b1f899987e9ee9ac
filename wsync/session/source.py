"""A trainer rank: joins, and for each publish replays its program. Knows addresses and slices, no framework.

Threads: `publish` returns at once; a worker thread packs and sends. Between `publish` and *released* the described
memory must not change. One publish is in flight at a time: a newer one supersedes what is not yet committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from wsync import kernels
from wsync.errors import (
    CommitError,
    DeadlineError,
    NonFiniteError,
    PeerLostError,
    PlanMismatchError,
    StateError,
    WsyncError,
)
from wsync.plan.program import ShardMemory, SourceProgram, compile_source
from wsync.plan.types import SourceSlice
from wsync.session.channel import Channel
from wsync.session.clock import Stopwatch, deadline_after, remaining
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
    PublishRequest,
    Ready,
    Rejoin,
    Setup,
    SourceJoin,
    ToClient,
)
from wsync.session.report import PublishReport, build_report
from wsync.spec.manifest import SourceRankManifest
from wsync.spec.serde import FORMAT_VERSION, decode
from wsync.transport import SourceEnd

_GRACE_S = 2.0
"""A rank waits this much longer than the coordinator, whose error says more."""


class Publication:
    """One publish on one trainer rank. Made by `Source.publish`.

    Attributes:
        version: what is published.
    """

    def __init__(self, version: int, deadline_s: float) -> None:
        self.version = version
        self.deadline = deadline_after(deadline_s)
        self.began_s = time.monotonic()
        self.released_s = 0.0
        self._released = threading.Event()
        self._over = threading.Event()
        self._error: WsyncError | None = None
        self._report: PublishReport | None = None

    @property
    def released(self) -> bool:
        """Whether the optimizer may write again."""
        return self._released.is_set()

    @property
    def over(self) -> bool:
        """Whether every replica committed or was dropped."""
        return self._over.is_set()

    def wait_released(self) -> None:
        """Wait until this rank's memory was read: the optimizer may write again.

        Raises:
            WsyncError: the publish failed; the memory is not read any more either.
        """
        self._wait(self._released, "the release")
        if self._error is not None and not self.released_s:
            raise self._error

    def wait_committed(self) -> PublishReport:
        """Wait until every replica committed or was dropped.

        Raises:
            CommitError: fewer replicas than needed committed; ``replicas`` says what each one serves.
            WsyncError: the error that ended the publish, the same on every trainer rank.
        """
        self._wait(self._over, "the commit")
        if self._error is not None:
            raise self._error
        if self._report is None:
            raise StateError(f"version {self.version} ended without a report")
        return self._report

    def _wait(self, event: threading.Event, what: str) -> None:
        if not event.wait(max(0.0, self.deadline + 2 * _GRACE_S - time.monotonic())):
            raise DeadlineError(f"ran out of time waiting for {what} of version {self.version}")

    # ---- the worker's side

    def mark_released(self) -> None:
        """The memory was read."""
        self.released_s = time.monotonic()
        self._released.set()

    def finish(self, report: PublishReport | None, error: WsyncError | None) -> None:
        """The publish is over."""
        self._report, self._error = report, error
        self._over.set()
        self._released.set()


class SourceSession:
    """Joins the store and publishes.

    Args:
        channel: to the coordinator.
        manifest: what this rank holds.
        memory: where, in the manifest's order.
        open_transport: makes this rank's end of the transport of that name.
        num_threads: of the pack kernels.

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
    ) -> None:
        self._channel = channel
        self._manifest = manifest
        self._memory = memory
        self._open_transport = open_transport
        self._num_threads = num_threads
        self._slice: SourceSlice | None = None
        self._program: SourceProgram | None = None
        self._end: SourceEnd | None = None
        self._finished: Finished | None = None
        self._last_seq = 0
        self._worker: threading.Thread | None = None
        self._publication: Publication | None = None
        self._watch = Stopwatch()
        deadline = deadline_after(join_deadline_s)
        channel.send(SourceJoin(FORMAT_VERSION, transport, manifest))
        self._incarnation = self._await_acceptance(deadline)

    def _await_acceptance(self, deadline: float) -> int:
        while True:
            message = self._channel.recv(deadline, f"all {self._manifest.world_size} trainer ranks to join")
            if isinstance(message, Accepted):
                return message.incarnation

    def publish(self, version: int, min_replicas: int, deadline_s: float) -> Publication:
        """Start a publish. See `wsync.Source.publish`."""
        previous = self._publication
        if previous is not None and not previous.released:
            raise StateError(
                f"publish(version={version}) while version {previous.version} is not released",
                hint="call wait_released() first",
            )
        publication = Publication(version, deadline_s)
        self._channel.send(PublishRequest(version, min_replicas, deadline_s))
        worker = self._worker
        self._publication = publication
        self._worker = threading.Thread(
            target=self._run, args=(publication, worker), name=f"wsync-publish-{version}", daemon=True
        )
        self._worker.start()
        return publication

    def close(self) -> None:
        """Leave. A publish in flight fails. May be called twice."""
        self._channel.close()
        if self._worker is not None:
            self._worker.join(timeout=5)
        if self._end is not None:
            self._end.close()
            self._end = None

    # ---- the worker thread

    def _run(self, publication: Publication, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        deadline = publication.deadline + _GRACE_S
        try:
            finished = self._serve(publication, deadline)
            self._last_seq = finished.seq
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

    def _serve(self, publication: Publication, deadline: float) -> Finished:
        self._finished = None
        what = f"version {publication.version} to be over"
        while self._finished is None:
            message = self._channel.recv(deadline, what)
            seq = 0
            if isinstance(message, Rejoin):
                self._check_incarnation(message)
                continue
            try:
                if isinstance(message, Setup):
                    self._setup(message)
                elif isinstance(message, Connect):
                    self._connect(message, deadline)
                elif isinstance(message, Begin):
                    seq = message.seq
                    self._replay(message, publication)
                else:
                    self._take(message)
            except Exception as e:  # every rank must learn of it
                if self._finished is None:
                    self._channel.send(Failed(seq, Fault.of(e)))
        return self._finished

    def _take(self, message: ToClient) -> None:
        if isinstance(message, Finished) and message.seq > self._last_seq:
            self._finished = message

    def _check_incarnation(self, message: Rejoin) -> None:
        if message.incarnation != self._incarnation:
            raise PeerLostError(
                f"trainer rank 0 restarted: incarnation {self._incarnation} is gone, {message.incarnation} is there",
                hint="make a new Source on every trainer rank",
            )

    def _cancelled(self) -> None:
        message = self._channel.poll()
        if message is not None:
            self._take(message)
        if self._finished is not None:
            fault = self._finished.fault
            raise fault.to_error() if fault else CommitError(f"round {self._finished.seq} ended while it was sent")

    def _setup(self, message: Setup) -> None:
        if self._end is not None:
            self._end.close()
        self._slice = decode(message.slice_, SourceSlice)
        if self._slice.plan_digest != message.plan_digest:
            raise PlanMismatchError(f"a slice of plan {self._slice.plan_digest} came with plan {message.plan_digest}")
        self._program = compile_source(self._slice, self._manifest.tensors, self._memory)
        self._end = self._open_transport(message.transport)
        offer = self._end.prepare(self._slice, message.num_sources)
        self._channel.send(Offer(message.epoch, message.plan_digest, offer))

    def _connect(self, message: Connect, deadline: float) -> None:
        if self._end is None or self._slice is None:
            raise StateError("Connect came before Setup")
        self._end.connect(list(message.source_offers), list(message.sink_offers), deadline)
        self._channel.send(Ready(message.epoch, self._slice.plan_digest))

    def _replay(self, begin: Begin, publication: Publication) -> None:
        if self._end is None or self._slice is None or self._program is None:
            raise StateError("Begin came before Setup")
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
            self._pack_and_send(deadline)
        publication.mark_released()
        self._channel.send(Packed(begin.seq, self._watch.take()))
        with self._watch.phase("flush"):
            self._end.flush(deadline, self._cancelled)
        self._channel.send(Flushed(begin.seq, self._watch.take()))

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
            end.exchange_max(program.amax_vector, deadline, self._cancelled)
            kernels.scales_from_amax(program.amax_descs)

    def _pack_and_send(self, deadline: float) -> None:
        program, end = self._program, self._end
        if program is None or end is None:
            return
        for pos, descs in enumerate(program.buckets):
            digest, bad = kernels.pack(descs, end.address(pos), self._num_threads)
            if bad is not None:
                raise self._non_finite(*program.locate(pos, *bad))
            end.send(pos, (digest + program.padding_digests[pos]) % 2**64, deadline, self._cancelled)
            self._cancelled()

    def _non_finite(self, name: str, index: tuple[int, ...]) -> NonFiniteError:
        return NonFiniteError(f"tensor {name!r} is not finite at index {index} (trainer rank {self._manifest.rank})")
