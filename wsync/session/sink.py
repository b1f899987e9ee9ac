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
    DigestError,
    PeerLostError,
    PlanMismatchError,
    StateError,
    TransportError,
    WsyncError,
)
from wsync.plan.program import StorageMemory, compile_sink
from wsync.plan.types import SinkSlice
from wsync.session.channel import Channel
from wsync.session.clock import Stopwatch, deadline_after
from wsync.session.install import Installer
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
    Waiting,
)
from wsync.spec.manifest import RankInfo, SinkRankManifest, TensorSpec
from wsync.spec.serde import FORMAT_VERSION, decode, digest_of
from wsync.transport import SinkEnd, Staged

_REJOIN_S = 1.0
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
        first_install: called on the engine's thread in the first commit of each epoch.

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
        first_install: Callable[[], None] = lambda: None,
    ) -> None:
        self.version: int | None = None
        self.incarnation = 0
        self.last_pause_s = 0.0
        self._channel = channel
        self._describe = describe
        self._open_transport = open_transport
        self._first_install = first_install
        self._num_threads = num_threads
        self._join = SinkJoin(FORMAT_VERSION, replica, rank, world_size, info)
        self._name = f"{replica}/{rank}"
        self._manifest: SinkRankManifest | None = None
        self._storages: Sequence[StorageMemory] = ()
        self._names_digest = ""
        self._joined_incarnation = 0
        self._slice: SinkSlice | None = None
        self._installer: Installer | None = None
        self._end: SinkEnd | None = None
        self._staged: dict[int, Staged] = {}
        self._epoch = 0
        self._seq = 0
        self._prepared = False
        self._ticket: Ticket | None = None
        self._poisoned = False
        self._last_join_s = 0.0
        self._aborted: Aborted | None = None
        self._watch = Stopwatch()
        self._lock = threading.Lock()
        deadline = deadline_after(join_deadline_s)
        self._send_join()
        self._await_names(deadline)

    @property
    def state(self) -> str:
        """What live memory is. A poisoned rank stays so until a commit is through, whatever it has prepared."""
        if self._poisoned:
            return POISONED
        return PREPARED if self._prepared else SERVING

    # ---- joining

    def _send_join(self) -> None:
        self._last_join_s = time.monotonic()
        self._channel.send(self._join)

    def _rejoin(self, message: Rejoin) -> None:
        """The coordinator does not know this rank: it restarted, or gave the rank up while it was silent."""
        if message.incarnation != self._joined_incarnation or time.monotonic() > self._last_join_s + _REJOIN_S:
            self._send_join()
        if message.incarnation != self._joined_incarnation:
            self._joined_incarnation, self._seq = message.incarnation, 0

    def _await_names(self, deadline: float) -> None:
        while True:
            message = self._channel.recv(deadline, "the trainer's name table")
            if isinstance(message, NameTable):
                self._take_names(message)
            elif isinstance(message, Rejoin):
                self._rejoin(message)
            elif isinstance(message, Accepted):
                return

    def _take_names(self, message: NameTable) -> None:
        """Record once; the same names again (a restarted trainer) need no new recording."""
        if message.names_digest != self._names_digest:
            if digest_of(message.tensors) != message.names_digest:
                raise PlanMismatchError(
                    f"the name table has digest {digest_of(message.tensors)}, {message.names_digest} was announced"
                )
            try:
                self._manifest, self._storages = self._describe(message.tensors)
            except BaseException as e:
                self._channel.send(Failed(0, 0, Fault.of(e)))  # the trainer must learn why this engine does not fit
                raise
            self._names_digest = message.names_digest
        self._joined_incarnation = message.incarnation
        if self._manifest is not None:
            self._channel.send(SinkDescribed(message.names_digest, self._manifest))

    # ---- prepare

    def prepare(self, deadline_s: float) -> Ticket:
        """Stage the next version. See `wsync.Sink.prepare`."""
        if self._prepared:
            raise StateError(f"{self._name}: prepare() while a version is prepared", hint="commit its ticket first")
        deadline = deadline_after(deadline_s)
        entered_s = time.monotonic()
        self._channel.send(Waiting())
        while True:
            message = self._channel.recv(deadline, f"the next version for {self._name}", patient=True)
            if self._is_stale(message, entered_s):
                self._channel.send(Waiting())  # it may have counted as asleep since
                continue
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
                self._channel.send(Failed(seq, self._epoch, Fault.of(e)))
                raise
            except BaseException as e:
                self._channel.send(Failed(seq, self._epoch, Fault.of(e)))
                raise
            if ticket is not None:
                return ticket

    def _is_stale(self, message: ToClient, entered_s: float) -> bool:
        """What came while nobody was in prepare, and is over by now."""
        if isinstance(message, (Setup, Connect, Begin)):
            return time.monotonic() > self._channel.arrived_s + message.deadline_s
        return isinstance(message, Aborted) and self._channel.arrived_s < entered_s

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
            self._rejoin(message)
        elif isinstance(message, Setup):
            self._setup(message)
        elif isinstance(message, Connect):
            self._connect(message)
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
        self._epoch = message.epoch
        self._slice = decode(message.slice_, SinkSlice)
        if self._slice.plan_digest != message.plan_digest:
            raise PlanMismatchError(f"a slice of plan {self._slice.plan_digest} came with plan {message.plan_digest}")
        program = compile_sink(self._slice, self._manifest, self._storages)
        self._end = self._open_transport(message.transport)
        self._installer = Installer(program, self._end, self._num_threads, self._name, self._first_install)
        self._channel.send(Offer(message.epoch, message.plan_digest, self._end.prepare(self._slice)))

    def _connect(self, message: Connect) -> None:
        if self._end is None or self._slice is None or message.epoch != self._epoch:
            raise StateError(f"{self._name}: Connect of epoch {message.epoch} came in epoch {self._epoch}")
        deadline = self._channel.arrived_s + message.deadline_s
        self._end.connect(list(message.source_offers), list(message.sink_offers), deadline, self._setup_cancelled)
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
        deadline = self._channel.arrived_s + begin.deadline_s
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
        self._prepared = True
        self._ticket = Ticket(begin.version, self._joined_incarnation, begin.seq, deadline)
        return self._ticket

    def _setup_cancelled(self) -> None:
        """While this rank connects: the coordinator may give the epoch up."""
        message = self._channel.poll()
        if isinstance(message, Aborted):
            self._aborted = message
            raise message.fault.to_error()
        if isinstance(message, Setup):
            self._channel.unread(message)
            raise TransportError(f"{self._name}: epoch {self._epoch} was given up for epoch {message.epoch}")

    def _cancelled(self) -> None:
        message = self._channel.poll()
        if isinstance(message, Aborted) and message.seq == self._seq:
            self._aborted = message
            raise message.fault.to_error()

    # ---- commit

    def commit(self, ticket: Ticket) -> None:
        """Make live memory the ticket's version. See `wsync.Sink.commit`."""
        self._check_ticket(ticket)
        began = time.monotonic()
        with self._watch.phase("decide"):
            self._await_decision(ticket)
        try:
            if self._installer is None:
                raise StateError(f"{self._name}: commit came before Setup")
            with self._watch.phase("install"):
                self._installer.install(self._staged, ticket.seq)
        except BaseException as e:  # whatever it was, live memory may be half written
            self._poison()
            self._channel.send(Failed(ticket.seq, self._epoch, Fault.of(e)))
            raise
        self._channel.send(Installed(ticket.seq, self._watch.take()))
        self._await_replica(ticket)
        self.last_pause_s = time.monotonic() - began
        self.version, self.incarnation = ticket.version, ticket.incarnation
        self._prepared = self._poisoned = False
        if self._end is not None:
            self._end.release(ticket.seq)

    def _check_ticket(self, ticket: Ticket) -> None:
        if not self._prepared or ticket != self._ticket:
            raise StateError(f"{self._name}: commit of {ticket} in state {self.state!r}; prepared is {self._ticket}")

    @property
    def is_over(self) -> bool:
        """Whether nothing can be prepared any more: closed, refused, or another key."""
        return self._channel.is_broken

    def holds(self, ticket: Ticket) -> bool:
        """Whether the ticket is prepared and waits for its commit."""
        return self._prepared and ticket == self._ticket

    def reject(self, ticket: Ticket, error: WsyncError) -> None:
        """Tell the trainer that this rank cannot install what it voted for. Nothing is written.

        The decision may have been taken already, so the replica counts as poisoned until the next full commit.
        """
        self._check_ticket(ticket)
        self._poison()
        self._channel.send(Failed(ticket.seq, self._epoch, Fault.of(error)))

    def _poison(self) -> None:
        self._poisoned, self._prepared = True, False
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
                self._prepared = False
                raise CommitError(
                    f"version {ticket.version} was not committed: {e.message}",
                    replicas={self._join.replica: POISONED if self._poisoned else "old version serving"},
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

    def close(self) -> None:
        """Leave. May be called twice. The caller has seen to it that no other thread is in prepare or commit."""
        self._channel.close()
        if self._end is not None:
            self._end.close()
            self._end = None

    def leave(self) -> None:
        """Say goodbye, and make waits in other threads end."""
        self._channel.close()
