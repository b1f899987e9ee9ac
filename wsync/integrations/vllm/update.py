"""One version on one server: wait until it is staged, pause, commit, label, resume.

What is staged costs the server nothing, so everything that can be done before the pause is. Inside it are three calls:
``update_weights``, ``finish_weight_update`` (a label may only change while nothing is generated) and ``resume``.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from wsync.errors import ConnectError, DeadlineError, WsyncError
from wsync.integrations.vllm.choices import PausePolicy
from wsync.integrations.vllm.reports import ABSENT, COMMITTED, LOST, OLD_VERSION, POISONED, ServerReport
from wsync.integrations.vllm.server import CLEANUP_S, Server, finish, limited, named_errors

if TYPE_CHECKING:
    from wsync.api import Publication, Source

_OUTCOME_POLL_S = 0.02
_NOTICE_S = 2.0
"""Seconds in which the coordinator notices that a process is gone."""
_COMMIT_S = 0.1
"""Seconds that a commit is taken to need at least. One that the deadline cuts off leaves a server poisoned."""
_WORTH_LEAVING_S = 1.0
"""With less time left than this a server that cannot take the version stays: joining again stops it for a moment."""


class ServerUpdate:
    """Takes one version to one server. Runs on a thread of its own; `report` is there when `run` returns.

    Attributes:
        is_absent: the publish went on without the server, or an engine of it.
        has_left: it left the trainer, because it cannot take the version, and has to join again.
    """

    def __init__(self, server: Server, source: Source, publication: Publication, policy: PausePolicy) -> None:
        self._server = server
        self._source = source
        self._publication = publication
        self._policy = policy
        self._began = time.monotonic()
        self._staged_s = self._pause_s = self._commit_s = 0.0
        self._error = ""
        self._touched = False
        self._given_s = publication.deadline - self._began
        self.is_absent = False
        self.has_left = False
        self.report: ServerReport | None = None

    def run(self) -> None:
        """Do it. Never raises: what went wrong is in the report."""
        try:
            self.report = self._run()
        except Exception as e:  # nobody waits on this thread's errors
            self._note(e)
            self.report = self._finished(LOST, dict.fromkeys(self._server.replicas, "unknown"))

    def _run(self) -> ServerReport:
        # Nothing here touches the server, so it may join meanwhile, and be heard to be absent before that is through.
        heard = {name: self._hear(name) for name in self._server.replicas}
        self._staged_s = time.monotonic() - self._began
        self.is_absent = not heard or "absent" in heard.values()
        ready = [name for name, state in heard.items() if state == "prepared"]
        if not ready:
            with self._server.claimed() as is_free:
                return self._without_update(heard, is_free)
        with self._server.busy:
            if self._server.is_removed:
                self._error = "it is none of the fleet's any more"
                return self._finished(ABSENT, dict.fromkeys(heard, ABSENT))
            return self._update(ready, heard)

    def _hear(self, replica: str) -> str:
        try:
            return self._publication.wait_replica(replica)
        except WsyncError as e:
            self._note(e)
            return "dropped"

    def _without_update(self, heard: dict[str, str], is_free: bool) -> ServerReport:
        """No replica can take the version: the server is not even paused."""
        known = {"committed": COMMITTED, "absent": ABSENT}
        states = {name: known.get(state) or self._unwritten(name) for name, state in heard.items()}
        state = _worst(states) if states else ABSENT
        self._explain(heard)
        if is_free and self._server.held and not self._server.poisoned:
            self._resume(0.0 if state in (ABSENT, LOST) else CLEANUP_S)  # the last resume did not get through
        return self._finished(state, states)

    def _explain(self, heard: dict[str, str]) -> None:
        """Why some replica has not got the version, if no error said so."""
        if self._error:
            return
        absent = [name for name, state in heard.items() if state == "absent"]
        if not heard or absent:
            who = "it" if len(absent) == len(heard) else ", ".join(absent)
            why = f": {self._server.join_error}" if self._server.join_error else ""
            self._error = f"{who} has not joined the trainer{', and joins now' if self._server.is_joining else ''}{why}"
        else:
            faults = self._publication.dropped
            self._error = "; ".join(faults[name] for name in heard if name in faults)

    def _unchanged(self) -> str:
        return POISONED if self._server.poisoned else OLD_VERSION

    def _unwritten(self, replica: str, error: WsyncError | None = None) -> str:
        """What a replica serves that was never asked to write: what it had, or nothing if it is gone."""
        fault = self._publication.dropped.get(replica, "")
        may_be_gone = isinstance(error, ConnectError) or fault.startswith(("PeerLostError", "TransportError"))
        end = time.monotonic() + (_NOTICE_S if may_be_gone else 0.0)
        while (state := self._known_state(replica)) != LOST and time.monotonic() < end:
            time.sleep(_OUTCOME_POLL_S)
        return LOST if state == LOST else self._unchanged()

    # ---- with an update

    def _update(self, ready: list[str], heard: dict[str, str]) -> ServerReport:
        try:
            self._open()
        except WsyncError as e:  # nothing was written, and it is not paused
            self._note(e)
            states = {name: self._apart(name, heard, e) for name in heard}
            self._leave()
            return self._finished(_worst(states), states)
        return self._paused_update(ready, heard)

    def _apart(self, replica: str, heard: dict[str, str], error: WsyncError | None = None) -> str:
        """What a replica serves that nobody asked to write."""
        if heard[replica] == "committed":
            return COMMITTED
        if heard[replica] == "absent" and not self._server.poisoned:
            return ABSENT
        return self._unwritten(replica, error) if error is not None else self._unchanged()

    def _leave(self) -> None:
        """Nothing was written and nothing will be: the trainer need not wait until the deadline for this server."""
        if self._left() > _WORTH_LEAVING_S:
            self.has_left = self._server.leave()

    def _open(self) -> None:
        """Open the update session, before the pause. A session that an earlier failure left open is closed first."""
        client = self._server.client
        with limited(client, self._left()), named_errors(self._server, "start_weight_update"):
            try:
                client.start_weight_update()
            except (DeadlineError, ConnectError):
                raise
            except Exception:
                with contextlib.suppress(Exception):
                    finish(client, None)
                client.start_weight_update()

    def _paused_update(self, ready: list[str], heard: dict[str, str]) -> ServerReport:
        began = time.monotonic()
        try:
            self._pause()
            self._commit(ready, uniform=len(ready) == len(heard))
            states = {name: COMMITTED if name in ready else self._apart(name, heard) for name in heard}
            self._explain(heard)
        except WsyncError as e:
            self._note(e)
            states = self._after_failure(ready, heard, e)
        state = _worst(states)
        if self._touched:
            self._server.poisoned = state in (LOST, POISONED)
        self._server.held = self._server.pausable
        if not self._server.poisoned:
            self._resume(0.0 if state == LOST else CLEANUP_S)
        self._pause_s = time.monotonic() - began
        if not self._touched:
            self._leave()
        return self._finished(state, states)

    def _pause(self) -> None:
        if not self._server.pausable:
            return
        with limited(self._server.client, self._left()), named_errors(self._server, "pause"):
            self._server.client.pause(self._policy.mode, self._policy.clear_cache)

    def _commit(self, ready: list[str], uniform: bool) -> None:
        client, version = self._server.client, self._publication.version
        left = self._left()
        self._check_time(left)
        update: dict[str, Any] = {"version": version, "deadline_s": left}
        if not uniform:
            update["replicas"] = ready
        began = time.monotonic()
        self._touched = True
        with limited(client, left + CLEANUP_S):
            with named_errors(self._server, "update_weights"):
                client.update_weights(update)
            self._commit_s = self._server.commit_s = time.monotonic() - began
            with named_errors(self._server, "finish_weight_update"):
                # A server whose engines differ has no one version: its label stays.
                finish(client, str(version) if uniform else None)

    def _check_time(self, left: float) -> None:
        """A commit that has begun is not begun in vain: it has the time that the last one took, within reason."""
        needed = max(_COMMIT_S, min(self._server.commit_s, self._given_s / 4))
        if left < needed:
            raise DeadlineError(
                f"server {self._server.name!r} was paused {left:.2f} s before the deadline of version "
                f"{self._publication.version}, and a commit is taken to need {needed:.2f} s"
            )

    def _after_failure(self, ready: list[str], heard: dict[str, str], error: WsyncError) -> dict[str, str]:
        """What each replica serves now, as the coordinator knows it. Closes the session."""
        if not self._touched:  # no worker was asked to write: whatever is voted, the old version is what is there
            self._close_session(None)
            return {name: self._apart(name, heard, error) for name in heard}
        states = {name: self._await_outcome(name) if name in ready else self._apart(name, heard) for name in heard}
        done = set(states.values()) == {COMMITTED}
        self._close_session(str(self._publication.version) if done else None)
        return states

    def _close_session(self, weight_version: str | None) -> None:
        with limited(self._server.client, CLEANUP_S), contextlib.suppress(Exception):
            finish(self._server.client, weight_version)

    def _resume(self, patience_s: float) -> None:
        error = self._server.resume(patience_s)
        if error is not None:
            self._note(error)

    # ---- what is known of the publish

    def _await_outcome(self, replica: str) -> str:
        """What a replica serves whose commit was begun and did not come back. The coordinator knows, in the end."""
        end = self._publication.deadline + CLEANUP_S
        while not self._publication.over and time.monotonic() < end:
            if self._publication.replicas.get(replica) in ("committed", "dropped"):
                break
            time.sleep(_OUTCOME_POLL_S)
        if self._publication.replicas.get(replica) == "committed":
            return COMMITTED
        return self._known_state(replica)

    def _known_state(self, replica: str) -> str:
        """What the coordinator knows of a replica that did not commit."""
        try:
            status = self._source.replicas().get(replica)
        except WsyncError:  # the Source is closed: nobody knows
            return LOST
        if status is None or not status.complete:
            return LOST
        return POISONED if status.poisoned else OLD_VERSION

    def _left(self) -> float:
        return max(0.0, self._publication.deadline - time.monotonic())

    def _note(self, error: Exception) -> None:
        """The first error says what happened; later ones follow from it."""
        text = error.message if isinstance(error, WsyncError) else str(error)
        self._error = self._error or f"{type(error).__name__}: {text}"

    def _finished(self, state: str, replicas: dict[str, str]) -> ServerReport:
        return ServerReport(
            name=self._server.name,
            state=state,
            replicas=replicas,
            paused=self._server.held,
            staged_s=self._staged_s,
            pause_s=self._pause_s,
            commit_s=self._commit_s,
            error=self._error,
        )


def _worst(states: dict[str, str]) -> str:
    """One word for a server of several replicas."""
    kinds = set(states.values())
    return next(kind for kind in (LOST, POISONED, ABSENT, OLD_VERSION, COMMITTED) if kind in kinds)
