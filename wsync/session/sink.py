"""An engine rank: joins, stages versions, and commits them on the engine's thread.

State: ``serving`` (some version, or the weights it started with), ``prepared`` (voted; the old version still serves),
``poisoned`` (live memory is of no known version: do not serve; the next full commit heals it).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from wsync import kernels
from wsync.errors import (
    CommitError,
    DeadlineError,
    DigestError,
    PeerLostError,
    PlanMismatchError,
    StateError,
    TransportError,
    WsyncError,
)
from wsync.plan.program import SinkProgram, StorageMemory, compile_sink
from wsync.plan.types import SinkSlice
from wsync.session.channel import Channel
from wsync.session.clock import Stopwatch, deadline_after
from wsync.session.messages import (
    Aborted,
    Accepted,
    Begin,
    Connect,
    Decide,
    Failed,
    Fault,
    Installed,
    NameTable,
    Offer,
    Ready,
    Rejoin,
    ReplicaCommitted,
    Setup,
    SinkDescribed,
    SinkJoin,
    Stamp,
    ToClient,
    Voted,
)
from wsync.spec.manifest import RankInfo, SinkRankManifest, TensorSpec
from wsync.spec.serde import FORMAT_VERSION, decode, digest_of
from wsync.transport import SinkEnd, Staged

_VERDICT_S = 1.0
"""How long a rank whose transfer broke waits for the coordinator to say why."""

SERVING = "serving"
PREPARED = "prepared"
POISONED = "poisoned"

Describe = Callable[[tuple[TensorSpec, ...]], tuple[SinkRankManifest, Sequence[StorageMemory]]]


class Ticket(msgspec.Struct, frozen=True):
    """A staged and verified version that waits for its commit.

    Attributes:
        version: the trainer's number.
        incarnation: of the trainer.
        seq: number of the publish within the incarnation.
        deadline_s: monotonic time after which the trainer gives this replica up.
    """

    version: int
    incarnation: int
    seq: int
    deadline_s: float


class SinkSession:
    """Joins the store, prepares and commits.

    Args:
        channel: to the coordinator.
        describe: records the engine's loader against the trainer's name table.
        open_transport: makes this rank's end of the transport of that name.
        num_threads: of the digest and unpack kernels.

    Raises:
        WsyncError: the engine does not fit the trainer, or the deadline passed.
    """

    def __init__(
        self,
        channel: Channel,
        describe: Describe,
        open_transport: Callable[[str], SinkEnd],
        *,
        replica: str,
        rank: int,
        world_size: int,
        info: RankInfo,
        num_threads: int,
        join_deadline_s: float,
    ) -> None:
        self.version: int | None = None
        self.incarnation = 0
        self.state = SERVING
        self.last_pause_s = 0.0
        self._channel = channel
        self._describe = describe
        self._open_transport = open_transport
        self._num_threads = num_threads
        self._join = SinkJoin(FORMAT_VERSION, replica, rank, world_size, info)
        self._name = f"{replica}/{rank}"
        self._manifest: SinkRankManifest | None = None
        self._storages: Sequence[StorageMemory] = ()
        self._names_digest = ""
        self._joined_incarnation = 0
        self._slice: SinkSlice | None = None
        self._program: SinkProgram | None = None
        self._end: SinkEnd | None = None
        self._staged: dict[int, Staged] = {}
        self._read_back = True
        self._seq = 0
        self._aborted: Aborted | None = None
        self._watch = Stopwatch()
        self._lock = threading.Lock()
        deadline = deadline_after(join_deadline_s)
        channel.send(self._join)
        self._await_names(deadline)

    # ---- joining

    def _await_names(self, deadline: float) -> None:
        while True:
            message = self._channel.recv(deadline, "the trainer's name table")
            if isinstance(message, NameTable):
                self._take_names(message)
            elif isinstance(message, Accepted):
                return

    def _take_names(self, message: NameTable) -> None:
        """Record once; the same names again (a restarted trainer) need no new recording."""
        if message.names_digest != self._names_digest:
            if digest_of(message.tensors) != message.names_digest:
                raise PlanMismatchError(
                    f"the name table has digest {digest_of(message.tensors)}, {message.names_digest} was announced"
                )
            self._manifest, self._storages = self._describe(message.tensors)
            self._names_digest = message.names_digest
        self._joined_incarnation = message.incarnation
        if self._manifest is not None:
            self._channel.send(SinkDescribed(message.names_digest, self._manifest))

    # ---- prepare

    def prepare(self, deadline_s: float) -> Ticket:
        """Stage the next version. See `wsync.Sink.prepare`."""
        if self.state == PREPARED:
            raise StateError(f"{self._name}: prepare() while a version is prepared", hint="commit its ticket first")
        deadline = deadline_after(deadline_s)
        while True:
            message = self._channel.recv(deadline, f"the next version for {self._name}", patient=True)
            seq = message.seq if isinstance(message, Begin) else 0
            try:
                ticket = self._on(message, deadline)
            except WsyncError as e:
                if seq and self._aborted is None and isinstance(e, TransportError):
                    self._hear_why(seq)
                if self._aborted is not None:
                    if self._aborted.superseded:
                        continue
                    raise self._aborted.fault.to_error() from e
                self._channel.send(Failed(seq, Fault.of(e)))
                raise
            except BaseException as e:
                self._channel.send(Failed(seq, Fault.of(e)))
                raise
            if ticket is not None:
                return ticket

    def _hear_why(self, seq: int) -> None:
        """Bytes stopped coming: the coordinator may have ended ``seq``, and its word is on its way."""
        try:
            message = self._channel.recv(time.monotonic() + _VERDICT_S, "the reason")
        except WsyncError:
            return
        if isinstance(message, Aborted) and message.seq == seq:
            self._aborted = message
        else:
            self._channel.unread(message)

    def _on(self, message: ToClient, deadline: float) -> Ticket | None:
        self._aborted = None
        if isinstance(message, NameTable):
            self._take_names(message)
        elif isinstance(message, Rejoin):
            if message.incarnation != self._joined_incarnation:
                self._joined_incarnation = message.incarnation
                self._channel.send(self._join)
        elif isinstance(message, Setup):
            self._setup(message)
        elif isinstance(message, Connect):
            self._connect(message, deadline)
        elif isinstance(message, Begin):
            return self._stage(message)
        elif isinstance(message, Aborted) and not message.superseded and message.seq > self._seq:
            self._seq = message.seq
            self._aborted = message
            raise message.fault.to_error()
        return None

    def _setup(self, message: Setup) -> None:
        if self._manifest is None:
            raise StateError(f"{self._name}: Setup came before the name table")
        if self._end is not None:
            self._end.close()
            self._end = None
        self._slice = decode(message.slice_, SinkSlice)
        if self._slice.plan_digest != message.plan_digest:
            raise PlanMismatchError(f"a slice of plan {self._slice.plan_digest} came with plan {message.plan_digest}")
        self._program = compile_sink(self._slice, self._manifest, self._storages)
        self._read_back = True
        self._end = self._open_transport(message.transport)
        self._channel.send(Offer(message.epoch, message.plan_digest, self._end.prepare(self._slice)))

    def _connect(self, message: Connect, deadline: float) -> None:
        if self._end is None or self._slice is None:
            raise StateError(f"{self._name}: Connect came before Setup")
        self._end.connect(list(message.source_offers), list(message.sink_offers), deadline)
        self._channel.send(Ready(message.epoch, self._slice.plan_digest))

    def _stage(self, begin: Begin) -> Ticket:
        end, slice_ = self._end, self._slice
        if end is None or slice_ is None:
            raise StateError(f"{self._name}: Begin came before Setup")
        if begin.plan_digest != slice_.plan_digest:
            raise PlanMismatchError(
                f"{self._name} holds plan {slice_.plan_digest}, the publish is of {begin.plan_digest}"
            )
        self._seq = begin.seq
        deadline = time.monotonic() + begin.deadline_s
        self._watch.take()
        self._staged.clear()
        mismatched: list[str] = []
        verify_s = 0.0
        with self._watch.phase("receive"):
            for staged in end.receive(begin.seq, deadline, self._cancelled):
                started = time.monotonic()
                bucket = slice_.buckets[staged.bucket_pos]
                first_word = bucket.bucket_idx * slice_.bucket_bytes // 8
                got = kernels.digest(staged.address, bucket.used_bytes, first_word, self._num_threads)
                verify_s += time.monotonic() - started
                if got != staged.digest:
                    mismatched.append(f"bucket {bucket.bucket_idx}: published {staged.digest:016x}, staged {got:016x}")
                self._staged[staged.bucket_pos] = staged
        now = time.monotonic()
        self._watch.stamps.append(Stamp("verify", now - verify_s, now))
        if mismatched:
            raise DigestError(
                f"{self._name}: {len(mismatched)} buckets differ from what was published; {mismatched[0]}"
            )
        self._channel.send(Voted(begin.seq, self._watch.take()))
        self.state = PREPARED
        return Ticket(begin.version, self._joined_incarnation, begin.seq, deadline)

    def _cancelled(self) -> None:
        message = self._channel.poll()
        if isinstance(message, Aborted) and message.seq == self._seq:
            self._aborted = message
            raise message.fault.to_error()

    # ---- commit

    def commit(self, ticket: Ticket) -> None:
        """Make live memory the ticket's version. See `wsync.Sink.commit`."""
        if self.state != PREPARED or ticket.seq != self._seq:
            raise StateError(
                f"{self._name}: commit of publish {ticket.seq} in state {self.state!r}; the last is {self._seq}"
            )
        began = time.monotonic()
        with self._watch.phase("decide"):
            self._await_decision(ticket)
        try:
            with self._watch.phase("install"):
                self._install(ticket)
        except BaseException as e:  # whatever it was, live memory may be half written
            self._poison()
            self._channel.send(Failed(ticket.seq, Fault.of(e), installing=True))
            raise
        self._channel.send(Installed(ticket.seq, self._watch.take()))
        self._await_replica(ticket)
        self.last_pause_s = time.monotonic() - began
        self.version, self.incarnation, self.state = ticket.version, ticket.incarnation, SERVING
        if self._end is not None:
            self._end.release(ticket.seq)

    def _poison(self) -> None:
        self.state = POISONED
        self.version = None

    def _await(self, kind: type[ToClient], ticket: Ticket, what: str) -> None:
        """Wait for a message of ``kind`` about the ticket's publish."""
        while True:
            message = self._channel.recv(ticket.deadline_s + 2.0, what)
            if isinstance(message, Aborted) and message.seq == ticket.seq:
                self._aborted = message
                raise message.fault.to_error()
            if isinstance(message, Rejoin):
                raise PeerLostError(f"{self._name}: the trainer restarted before it said what to do")
            if isinstance(message, kind) and getattr(message, "seq", None) == ticket.seq:
                return

    def _await_decision(self, ticket: Ticket) -> None:
        self._aborted = None
        try:
            self._await(Decide, ticket, f"the decision on version {ticket.version}")
        except WsyncError as e:
            if self._aborted is not None:
                self.state = SERVING
                raise CommitError(
                    f"version {ticket.version} was not committed: {e.message}",
                    replicas={self._join.replica: "old version serving"},
                ) from e
            self._poison()
            raise CommitError(
                f"{self._name} voted for version {ticket.version} and never learnt the decision: {e.message}",
                replicas={self._join.replica: POISONED},
                hint="stop serving; the next full publish heals this replica",
            ) from e

    def _await_replica(self, ticket: Ticket) -> None:
        try:
            self._await(ReplicaCommitted, ticket, f"the other ranks of {self._join.replica} to install")
        except WsyncError as e:
            self._poison()
            raise CommitError(
                f"{self._name} installed version {ticket.version}, but its replica did not: {e.message}",
                replicas={self._join.replica: POISONED},
                hint="stop serving; the next full publish heals this replica",
            ) from e

    def _install(self, ticket: Ticket) -> None:
        end, program = self._end, self._program
        if end is None or program is None:
            raise StateError(f"{self._name}: commit came before Setup")
        self._check_valid(end, ticket)
        for pos, descs in enumerate(program.buckets):
            staged = self._staged[pos]
            got = kernels.unpack(descs, staged.address, self._num_threads)
            self._compare(staged, got, program.padding_digests[pos], "unpacked")
        self._check_valid(end, ticket)
        if self._read_back:
            # Layout mistakes are the same at every version: reading all live bytes back once per epoch finds them.
            for pos, descs in enumerate(program.buckets):
                got = kernels.installed_digest(descs, self._num_threads)
                self._compare(self._staged[pos], got, program.padding_digests[pos], "installed")
            self._read_back = False

    def _compare(self, staged: Staged, got: int, padding: int, what: str) -> None:
        total = (got + padding) % 2**64
        if total != staged.digest:
            raise DigestError(
                f"{self._name}: bucket at position {staged.bucket_pos}: published {staged.digest:016x}, "
                f"{what} {total:016x}"
            )

    def _check_valid(self, end: SinkEnd, ticket: Ticket) -> None:
        if not end.still_valid(ticket.seq):
            raise DigestError(
                f"{self._name}: staging of version {ticket.version} was overwritten before it was installed"
            )

    def close(self) -> None:
        """Leave. May be called twice."""
        self._channel.close()
        if self._end is not None:
            self._end.close()
            self._end = None


def is_retryable(error: WsyncError) -> bool:
    """Whether a background loop should go on preparing after this error."""
    return not isinstance(error, (StateError, PlanMismatchError)) and not (
        isinstance(error, TransportError) and not isinstance(error, (DeadlineError, PeerLostError))
    )
