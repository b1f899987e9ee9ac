"""A staged version between this rank's vote and the coordinator's last word on it."""

from __future__ import annotations

import time

import msgspec

from wsync.errors import DeadlineError, PeerLostError, WsyncError
from wsync.session.channel import Channel
from wsync.session.messages import Aborted, Decide, Rejoin, ReplicaCommitted, ToClient

_LATE_S = 2.0
"""A rank that voted waits this much longer than the coordinator, whose word says more."""


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


class Vote:
    """Hears what becomes of a ticket. One thread at a time.

    Attributes:
        ticket: that this rank voted for.
        decided: the coordinator said that all ranks may install.
        aborted: the coordinator said that the version is over for this replica.
    """

    def __init__(self, channel: Channel, ticket: Ticket, name: str) -> None:
        self.ticket = ticket
        self.decided = False
        self.aborted = False
        self._channel = channel
        self._name = name

    @property
    def refused(self) -> bool:
        """Whether no rank of the replica installs this version, for sure."""
        return self.aborted and not self.decided

    def why_void(self) -> WsyncError | None:
        """Look at what came since, without waiting: why the ticket is void, or None."""
        try:
            while (message := self._channel.poll()) is not None:
                try:
                    self._hear(message)
                except WsyncError as e:
                    return e
        except WsyncError as e:  # of the channel; a trainer that is merely silent may come back before the deadline
            if self._channel.is_broken:
                return e
        if time.monotonic() > self.ticket.deadline_s + _LATE_S:
            return DeadlineError("it was not committed in time, and the trainer said nothing more")
        return None

    def await_decision(self, what: str) -> None:
        """Wait until the coordinator decides.

        Raises:
            WsyncError: it did not, or not so.
        """
        while not self.decided:
            self._hear(self._channel.recv(self.ticket.deadline_s + _LATE_S, what))

    def await_replica(self, what: str) -> None:
        """Wait until all ranks of the replica installed.

        Raises:
            WsyncError: they did not.
        """
        while not self._hear(self._channel.recv(self.ticket.deadline_s + _LATE_S, what)):
            pass

    def _hear(self, message: ToClient) -> bool:
        """Take a message. Returns whether it says that the replica serves the version.

        Raises:
            WsyncError: it says that nothing comes of the version.
        """
        if isinstance(message, Rejoin):
            raise PeerLostError(f"{self._name}: the trainer restarted before the commit was through")
        if getattr(message, "seq", None) != self.ticket.seq:
            return False
        if isinstance(message, Aborted):
            self.aborted = True
            raise message.fault.to_error()
        self.decided |= isinstance(message, Decide)
        return isinstance(message, ReplicaCommitted)
