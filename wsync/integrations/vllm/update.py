"""One version on one server: wait until it is staged, pause, commit, label, resume.

What is staged costs the server nothing, so everything that can be done before the pause is. Inside it are three calls:
``update_weights``, ``finish_weight_update`` (a label may only change while nothing is generated) and ``resume``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wsync.errors import ConnectError, DeadlineError, WsyncError
from wsync.integrations.vllm.choices import PausePolicy
from wsync.integrations.vllm.client import PausableClient
from wsync.integrations.vllm.reports import ABSENT, COMMITTED, LOST, OLD_VERSION, POISONED, ServerReport

if TYPE_CHECKING:
    from wsync.api import Publication, Source

_CLEANUP_S = 10.0
"""Seconds that a server is given to resume, past the publish's deadline if need be."""
_OUTCOME_POLL_S = 0.02
_NOTICE_S = 2.0
"""Seconds in which the coordinator notices that a process is gone."""


@dataclass
class Server:
    """One server of a fleet.

    Attributes:
        name: of the server, and of its replicas.
        client: to its control routes.
        replicas: names under which its engines joined.
        busy: held while a version goes to it.
        poisoned: its weights are of no known version; it stays paused until a commit heals it.
        held: it is paused, by this side.
        join_error: why it could not join again, the last time that it was absent.
    """

    name: str
    client: Any
    replicas: tuple[str, ...] = ()
    busy: threading.Lock = field(default_factory=threading.Lock)
    poisoned: bool = False
    held: bool = False
    join_error: str = ""

    @property
    def pausable(self) -> bool:
        """Whether this side pauses it; otherwise the caller does."""
        return isinstance(self.client, PausableClient)


@contextlib.contextmanager
def limited(client: Any, timeout_s: float) -> Iterator[None]:
    """Calls inside of the block end in time, where the client can do that."""
    limit = getattr(client, "limited", None)
    with limit(timeout_s) if callable(limit) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def named_errors(server: Server, call: str) -> Iterator[None]:
    """Errors of any client become ours and name the server."""
    try:
        yield
    except WsyncError:
        raise
    except TimeoutError as e:
        raise DeadlineError(f"server {server.name!r} did not answer {call} in time: {e}") from e
    except Exception as e:  # a client may be anybody's: requests', Ray's
        raise ConnectError(f"server {server.name!r}: {call} failed: {type(e).__name__}: {e}") from e


class ServerUpdate:
    """Takes one version to one server. Runs on a thread of its own; `report` is there when `run` returns."""

    def __init__(self, server: Server, source: Source, publication: Publication, policy: PausePolicy) -> None:
        self._server = server
        self._source = source
        self._publication = publication
        self._policy = policy
        self._began = time.monotonic()
        self._staged_s = self._pause_s = self._commit_s = 0.0
        self._error = ""
        self._touched = False
        self.report: ServerReport | None = None

    @property
    def is_absent(self) -> bool:
        """Whether the server has to join (again)."""
        return self.report is not None and self.report.state == ABSENT

    def run(self) -> None:
        """Do it. Never raises: what went wrong is in the report."""
        try:
            self.report = self._run()
        except Exception as e:  # nobody waits on this thread's errors
            self._note(e)
            self.report = self._finished(LOST, dict.fromkeys(self._server.replicas, "unknown"))

    def _run(self) -> ServerReport:
        heard = {name: self._hear(name) for name in self._server.replicas}
        self._staged_s = time.monotonic() - self._began
        ready = [name for name, state in heard.items() if state == "prepared"]
        if not ready:
            return self._without_update(heard)
        try:
            self._open()
        except WsyncError as e:  # nothing was written, and it is not paused
            self._note(e)
            states = {name: self._unwritten(name, e) for name in heard}
            return self._finished(_worst(states), states)
        return self._paused_update(ready, heard)

    def _hear(self, replica: str) -> str:
        try:
            return self._publication.wait_replica(replica)
        except WsyncError as e:
            self._note(e)
            return "dropped"

    def _without_update(self, heard: dict[str, str]) -> ServerReport:
        """No replica can take the version: the server is not even paused."""
        known = {"committed": COMMITTED, "absent": ABSENT}
        states = {name: known.get(state) or self._unwritten(name) for name, state in heard.items()}
        kinds = set(states.values())
        state = kinds.pop() if len(kinds) == 1 else LOST if LOST in kinds else self._unchanged() if states else ABSENT
        if not states or ABSENT in states.values():
            why = f": {self._server.join_error}" if self._server.join_error else ""
            self._error = self._error or f"it has not joined the trainer{why}"
        faults = self._publication.dropped
        self._error = self._error or "; ".join(faults[name] for name in states if name in faults)
        if self._server.held and not self._server.poisoned:
            self._resume()  # the last resume did not get through
        return self._finished(state, states)

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
                    _finish(client, None)
                client.start_weight_update()

    def _paused_update(self, ready: list[str], heard: dict[str, str]) -> ServerReport:
        began = time.monotonic()
        try:
            self._pause()
            self._commit(ready, uniform=len(ready) == len(heard))
            states = {name: COMMITTED if name in ready else self._unchanged() for name in heard}
        except WsyncError as e:
            self._note(e)
            states = self._after_failure(ready, heard, e)
        state = _worst(states)
        if self._touched:
            self._server.poisoned = state in (LOST, POISONED)
        self._server.held = self._server.pausable
        if not self._server.poisoned:
            self._resume()
        self._pause_s = time.monotonic() - began
        return self._finished(state, states)

    def _pause(self) -> None:
        if not self._server.pausable:
            return
        with limited(self._server.client, self._left()), named_errors(self._server, "pause"):
            self._server.client.pause(self._policy.mode, self._policy.clear_cache)

    def _commit(self, ready: list[str], uniform: bool) -> None:
        client, version = self._server.client, self._publication.version
        left = self._left()
        update: dict[str, Any] = {"version": version, "deadline_s": left}
        if not uniform:
            update["replicas"] = ready
        began = time.monotonic()
        self._touched = True
        with limited(client, left + _CLEANUP_S):
            with named_errors(self._server, "update_weights"):
                client.update_weights(update)
            self._commit_s = time.monotonic() - began
            with named_errors(self._server, "finish_weight_update"):
                # A server whose engines differ has no one version: its label stays.
                _finish(client, str(version) if uniform else None)

    def _after_failure(self, ready: list[str], heard: dict[str, str], error: WsyncError) -> dict[str, str]:
        """What each replica serves now, as the coordinator knows it. Closes the session."""
        if not self._touched:  # no worker was asked to write: whatever is voted, the old version is what is there
            self._close_session(None)
            return {name: self._unwritten(name, error) for name in heard}
        states = {name: self._await_outcome(name) if name in ready else self._unchanged() for name in heard}
        done = set(states.values()) == {COMMITTED}
        self._close_session(str(self._publication.version) if done else None)
        return states

    def _close_session(self, weight_version: str | None) -> None:
        with limited(self._server.client, _CLEANUP_S), contextlib.suppress(Exception):
            _finish(self._server.client, weight_version)

    def _resume(self) -> None:
        if not self._server.pausable:
            return
        try:
            with limited(self._server.client, _CLEANUP_S), named_errors(self._server, "resume"):
                self._server.client.resume()
            self._server.held = False
        except WsyncError as e:
            self._note(e)
            self._server.held = True

    # ---- what is known of the publish

    def _await_outcome(self, replica: str) -> str:
        """What a replica serves whose commit was begun and did not come back. The coordinator knows, in the end."""
        end = self._publication.deadline + _CLEANUP_S
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
    return next(kind for kind in (LOST, POISONED, OLD_VERSION, COMMITTED) if kind in kinds)


def _finish(client: Any, weight_version: str | None) -> None:
    """Close an update. Clients of older versions of vLLM take no label; None is the same as none."""
    if weight_version is None:
        client.finish_weight_update()
    else:
        client.finish_weight_update(weight_version)
