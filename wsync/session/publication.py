"""One publish as the trainer sees it: when its memory is free again, how far each replica is, how it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from wsync.errors import DeadlineError, StateError, WsyncError
from wsync.session.clock import deadline_after
from wsync.session.messages import Progress
from wsync.session.report import PublishReport

GRACE_S = 2.0
"""A rank waits this much longer than the coordinator, whose error says more."""


class Publication:
    """One publish on one trainer rank. Made by `Source.publish`.

    Attributes:
        version: what is published.
        seq: number of the publish within the Source.
    """

    def __init__(
        self, version: int, seq: int, deadline_s: float, check_unwritten: Callable[[], None] = lambda: None
    ) -> None:
        self.version = version
        self.seq = seq
        self.deadline = deadline_after(deadline_s)
        self.began_s = time.monotonic()
        self.released_s = 0.0
        self._check_unwritten = check_unwritten
        self._released = threading.Event()
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._replicas: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._begun = False
        self._error: WsyncError | None = None
        self._report: PublishReport | None = None
        self._untouched = False

    @property
    def released(self) -> bool:
        """Whether the optimizer may write again."""
        return self._released.is_set()

    @property
    def over(self) -> bool:
        """Whether every replica committed or was dropped."""
        return self._over.is_set()

    @property
    def left_no_trace(self) -> bool:
        """Whether it is over and no replica has taken or may have begun to take the version."""
        return self.over and self._untouched

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

    @property
    def replicas(self) -> dict[str, str]:
        """How far each replica of this publish is now, as far as this rank has heard. Empty before anything moves.

        ``"staging"``; ``"prepared"``: its ranks may commit; ``"committed"``; ``"dropped"``.
        """
        with self._changed:
            return dict(self._replicas)

    @property
    def dropped(self) -> dict[str, str]:
        """Why each replica was dropped that is, as far as this rank has heard."""
        with self._changed:
            return dict(self._faults)

    def wait_replica(self, replica: str, deadline_s: float | None = None) -> str:
        """Wait until it is known what becomes of one replica. Any thread, several at once.

        Args:
            replica: its name.
            deadline_s: seconds to wait; None waits as long as the publish lasts.

        Returns:
            ``"prepared"``: every rank of it holds the version, verified, and may commit it now. ``"committed"`` or
            ``"dropped"``: it is over for this replica. ``"absent"``: this publish goes on, or ended, without it.

        Raises:
            DeadlineError: nothing was known in time.
            WsyncError: the publish ended on this rank before it heard of the replica.
        """
        deadline = self.deadline + 2 * GRACE_S if deadline_s is None else deadline_after(deadline_s)
        with self._changed:
            while (known := self._fate(replica)) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    state = self._replicas.get(replica, "not taking part yet")
                    what = f"replica {replica!r} to prepare version {self.version}"
                    raise DeadlineError(f"ran out of time waiting for {what}: it is {state}")
                self._changed.wait(left)
        return known

    def _fate(self, replica: str) -> str | None:
        state = self._replicas.get(replica)
        if state is not None and state != "staging":
            return state
        if self._over.is_set() and self._report is None and self._error is not None:
            raise self._error
        return "absent" if state is None and (self._begun or self._over.is_set()) else None

    def _wait(self, event: threading.Event, what: str) -> None:
        if not event.wait(max(0.0, self.deadline + 2 * GRACE_S - time.monotonic())):
            raise DeadlineError(f"ran out of time waiting for {what} of version {self.version}")

    # ---- the worker's side

    def mark_released(self) -> None:
        """The memory was read.

        Raises:
            StateError: it was written meanwhile.
        """
        self._check_unwritten()
        self.released_s = time.monotonic()
        self._released.set()

    def takes_part(self, replicas: Sequence[str]) -> None:
        """The publish begins, with these replicas."""
        with self._changed:
            self._begun = True
            for name in replicas:
                self._replicas.setdefault(name, "staging")
            self._changed.notify_all()

    def progressed(self, message: Progress) -> None:
        """The coordinator said how far a replica is."""
        with self._changed:
            self._replicas[message.replica] = message.outcome
            if message.fault is not None:
                self._faults[message.replica] = f"{message.fault.name}: {message.fault.message}"
            self._changed.notify_all()

    def finish(self, report: PublishReport | None, error: WsyncError | None) -> None:
        """The publish is over."""
        self._report, self._error = report, error
        outcomes = set(report.replicas.values()) if report else {"unknown"}
        self._untouched = error is not None and outcomes <= {"old version serving"}
        with self._changed:
            if report is not None:
                self._replicas.update(dict.fromkeys(report.committed, "committed"))
                self._replicas.update(dict.fromkeys(report.dropped, "dropped"))
                self._faults.update(report.dropped)
            self._over.set()
            self._released.set()
            self._changed.notify_all()
