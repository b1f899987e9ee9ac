"""An engine rank: joins, stages versions, and commits them on the engine's thread.

State: ``serving`` (some version, or the weights it started with), ``prepared`` (voted; the old version still serves),
``poisoned`` (live memory is of no known version: do not serve; the next full commit heals it).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from wsync.errors import (
    CommitError,
    StateError,
    TransportError,
    WsyncError,
)
from wsync.session.channel import Channel
from wsync.session.clock import Stopwatch, deadline_after
from wsync.session.install import WriteConstants
from wsync.session.joining import Describe, Joining
from wsync.session.messages import (
    Aborted,
    Begin,
    Connect,
    Failed,
    Fault,
    Installed,
    NameTable,
    Rejoin,
    Setup,
    SinkJoin,
    Stamp,
    ToClient,
    Voted,
    Waiting,
)
from wsync.session.staging import Staging
from wsync.session.vote import Ticket, Vote
from wsync.spec.manifest import RankInfo
from wsync.spec.serde import FORMAT_VERSION
from wsync.transport import SinkEnd

_VERDICT_S = 1.0
"""How long a rank whose transfer broke waits for the coordinator to say why."""

_HEAL = "stop serving; the next full publish heals this replica"

SERVING = "serving"
PREPARED = "prepared"
POISONED = "poisoned"


class SinkSession:
    """Joins the store, prepares and commits.

    Args:
        channel: to the coordinator.
        describe: records the engine's loader against the trainer's name table.
        open_transport: makes this rank's end of the transport of that name.
        num_threads: of the digest and unpack kernels.
        write_constants: writes what the loader itself sets, see `Installer`.

    Attributes:
        version, incarnation: of the trainer, that live memory holds; None and 0 before the first commit.
        last_pause_s: seconds of the last commit.
        last_stamps: seconds by phase of the version that was committed last.
        bytes_installed: wire bytes that all commits together put in place.
        failed: the version that last failed on this rank and why, until it is tried again.

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
        write_constants: WriteConstants = lambda _: None,
    ) -> None:
        self.version: int | None = None
        self.incarnation = 0
        self.last_pause_s = 0.0
        self.last_stamps: dict[str, float] = {}
        self.bytes_installed = 0
        self.failed: tuple[int, WsyncError] | None = None
        self._channel = channel
        self._open_transport = open_transport
        self._write_constants = write_constants
        self._num_threads = num_threads
        self._replica = replica
        self._is_alone = world_size == 1
        self._name = f"{replica}/{rank}"
        self._joining = Joining(channel, describe, SinkJoin(FORMAT_VERSION, replica, rank, world_size, info))
        self._staging: Staging | None = None
        self._epoch = 0
        self._seq = 0
        self._vote: Vote | None = None
        self._committed: Ticket | None = None
        self._void: tuple[Ticket, CommitError] | None = None
        self._poisoned = False
        self._aborted: Aborted | None = None
        self._watch = Stopwatch()
        self._spent: dict[str, float] = {}
        self._lock = threading.Lock()
        self._joining.join(deadline_after(join_deadline_s))

    @property
    def state(self) -> str:
        """What live memory is. A poisoned rank stays so until a commit is through, whatever it has prepared."""
        if self._poisoned:
            return POISONED
        return SERVING if self._vote is None else PREPARED

    @property
    def _outcome(self) -> dict[str, str]:
        return {self._replica: POISONED if self._poisoned else "old version serving"}

    # ---- prepare

    def prepare(self, deadline_s: float) -> Ticket:
        """Stage the next version. See `wsync.Sink.prepare`."""
        if self._vote is not None:
            raise StateError(f"{self._name}: prepare() while a version is prepared", hint="commit its ticket first")
        deadline = deadline_after(deadline_s)
        entered_s = time.monotonic()
        self._channel.send(Waiting())
        while True:
            message = self._channel.recv(deadline, f"the next version for {self._name}", patient=True)
            if self._is_stale(message, entered_s):
                self._channel.send(Waiting())  # it may have counted as asleep since
                continue
            try:
                ticket = self._on(message)
            except BaseException as e:
                self._gave_up(message, e)
                continue
            if ticket is not None:
                return ticket

    def _gave_up(self, message: ToClient, error: BaseException) -> None:
        """Tell the trainer, if it did not say so itself. Returns only if a newer version replaces this one."""
        begin = message if isinstance(message, Begin) else None
        if begin is not None and self._aborted is None and isinstance(error, TransportError):
            self._hear_why(begin.seq)
        if isinstance(error, CommitError):
            error.replicas = self._outcome
        told = self._aborted is not None and isinstance(error, WsyncError)
        reason = self._aborted.fault.to_error() if told and self._aborted else error
        if begin is not None:
            self.failed = begin.version, reason if isinstance(reason, WsyncError) else Fault.of(reason).to_error()
        if not told:
            self._send_failed(begin.seq if begin else 0, error)
            raise error
        if self._aborted is None or not self._aborted.superseded:
            raise reason from error

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

    def _on(self, message: ToClient) -> Ticket | None:
        self._aborted = None
        if isinstance(message, NameTable):
            self._joining.take_names(message)
        elif isinstance(message, Rejoin):
            if self._joining.join_again(message):
                self._seq = 0
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
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._epoch = message.epoch
        self._staging = Staging(
            message,
            self._joining,
            self._open_transport,
            num_threads=self._num_threads,
            name=self._name,
            write_constants=self._write_constants,
        )
        self._channel.send(self._staging.offer())

    def _connect(self, message: Connect) -> None:
        deadline = self._channel.arrived_s + message.deadline_s
        self._channel.send(self._staged("Connect").connect(message, deadline, self._setup_cancelled))

    def _staged(self, what: str) -> Staging:
        if self._staging is None:
            raise StateError(f"{self._name}: {what} came before Setup")
        return self._staging

    def _stage(self, begin: Begin) -> Ticket:
        staging = self._staged("Begin")
        self._seq = begin.seq
        if self.failed is not None and self.failed[0] == begin.version:
            self.failed = None
        deadline = self._channel.arrived_s + begin.deadline_s
        self._watch.take()
        self._spent = {}
        try:
            staging.stage(begin, deadline, self._watch, self._cancelled)
            self._channel.send(Voted(begin.seq, self._take_stamps()))
        except BaseException:
            staging.installer.discard()
            raise
        ticket = Ticket(begin.version, self._joining.incarnation, begin.seq, deadline)
        self._vote = Vote(self._channel, ticket, self._name)
        return ticket

    def _take_stamps(self) -> tuple[Stamp, ...]:
        stamps = self._watch.take()
        for stamp in stamps:
            self._spent[stamp.phase] = self._spent.get(stamp.phase, 0.0) + stamp.end_s - stamp.begin_s
        return stamps

    def _send_failed(self, seq: int, error: BaseException) -> None:
        self._channel.send(Failed(seq, self._epoch, Fault.of(error)))

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

    # ---- a ticket that waits

    @property
    def is_over(self) -> bool:
        """Whether nothing can be prepared any more: closed, refused, or another key."""
        return self._channel.is_broken

    @property
    def is_prepared(self) -> bool:
        """Whether a ticket waits for its commit."""
        return self._vote is not None

    def holds(self, ticket: Ticket) -> bool:
        """Whether it is this ticket that waits for its commit."""
        return self._vote is not None and ticket == self._vote.ticket

    def withdraw(self, ticket: Ticket) -> CommitError | None:
        """If the trainer gave the ticket's version up: forget what was staged, and return why. Never waits.

        For the thread that prepared it. While another thread is in `commit`, and after it, this returns None.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            vote = self._vote
            reason = vote.why_void() if vote is not None and vote.ticket == ticket else None
            if vote is None or reason is None:
                return None
            # This rank has not begun to install and so knows its memory; what other ranks did it does not know.
            return self._never_committed(vote, reason, is_known=vote.refused or self._is_alone)
        finally:
            self._lock.release()

    def _never_committed(self, vote: Vote, reason: WsyncError, *, is_known: bool) -> CommitError:
        """Forget the version. ``is_known``: the whole replica is as it was."""
        self._forget()
        version = vote.ticket.version
        if vote.refused:
            message = f"version {version} was not committed: {reason.message}"
        elif vote.decided:
            message = f"version {version} was decided and {self._name} did not commit it: {reason.message}"
        else:
            message = f"{self._name} voted for version {version} and never learnt the decision: {reason.message}"
        if not is_known:
            self._poison()
        error = CommitError(message, replicas=self._outcome, hint="" if is_known else _HEAL)
        self._void, self.failed = (vote.ticket, error), (version, error)
        return error

    def _forget(self) -> None:
        """Nothing comes of what is staged: the engine need not keep what it prepared."""
        self._vote = None
        if self._staging is not None:
            self._staging.installer.discard()

    # ---- commit

    def commit(self, ticket: Ticket) -> None:
        """Make live memory the ticket's version. See `wsync.Sink.commit`."""
        with self._lock:
            vote = self._vote_for(ticket)
            staging = self._staged("commit")
            began = time.monotonic()
            with self._watch.phase("decide"):
                self._await_decision(vote)
            self._install(vote, staging)
            self._await_replica(vote)
            self.last_pause_s = time.monotonic() - began
            self.last_stamps = self._spent
            self.bytes_installed += staging.num_bytes
            self.version, self.incarnation = ticket.version, ticket.incarnation
            self._vote, self._committed, self._poisoned = None, ticket, False
            staging.end.release(ticket.seq)

    def _vote_for(self, ticket: Ticket) -> Vote:
        vote = self._vote
        if vote is not None and ticket == vote.ticket:
            return vote
        if self._void is not None and ticket == self._void[0]:
            raise self._void[1]
        if ticket == self._committed:
            raise StateError(f"{self._name}: version {ticket.version} is committed already; a ticket is good for once")
        waiting = vote.ticket if vote is not None else None
        raise StateError(f"{self._name}: commit of {ticket} in state {self.state!r}; prepared is {waiting}")

    def reject(self, ticket: Ticket, error: WsyncError) -> None:
        """Tell the trainer that this rank cannot install what it voted for. Nothing is written.

        The decision may have been taken already, so the replica counts as poisoned until the next full commit.
        """
        with self._lock:
            self._vote_for(ticket)
            self._poison()
            self._send_failed(ticket.seq, error)

    def _poison(self) -> None:
        self._forget()
        self._poisoned, self.version = True, None

    def _await_decision(self, vote: Vote) -> None:
        try:
            vote.await_decision(f"the decision on version {vote.ticket.version}")
        except WsyncError as e:
            raise self._never_committed(vote, e, is_known=vote.refused) from e

    def _install(self, vote: Vote, staging: Staging) -> None:
        seq = vote.ticket.seq
        try:
            with self._watch.phase("install"):
                staging.installer.install(seq)
            with self._watch.phase("finish"):
                staging.installer.finish()
        except BaseException as e:  # whatever it was, live memory may be half written
            self._poison()
            staging.distrust()
            if isinstance(e, CommitError):
                e.replicas, e.hint = self._outcome, e.hint or _HEAL
            self.failed = vote.ticket.version, Fault.of(e).to_error()
            self._send_failed(seq, e)
            raise
        self._channel.send(Installed(seq, self._take_stamps()))

    def _await_replica(self, vote: Vote) -> None:
        try:
            vote.await_replica(f"the other ranks of {self._replica} to install")
        except WsyncError as e:
            self._poison()
            raise CommitError(
                f"{self._name} installed version {vote.ticket.version}, but its replica did not: {e.message}",
                replicas=self._outcome,
                hint=_HEAL,
            ) from e

    # ---- the end

    def close(self) -> None:
        """Leave. May be called twice. The caller has seen to it that no other thread is in prepare or commit."""
        self._channel.close()
        self._vote = None
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def leave(self) -> None:
        """Say goodbye, and make waits in other threads end."""
        self._channel.close()
