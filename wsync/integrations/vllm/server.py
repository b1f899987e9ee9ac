"""One server of a fleet: what is known of it, and the calls that bring it to a known state."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from wsync.errors import ConnectError, DeadlineError, WsyncError
from wsync.integrations.vllm.client import PausableClient

CLEANUP_S = 10.0
"""Seconds that a server is given to resume or to leave, past the publish's deadline if need be."""
_RETRY_S = 0.2
_POLL_S = 0.05


@dataclass(eq=False)
class Server:
    """One server of a fleet.

    Attributes:
        name: of the server, and of its replicas.
        client: to its control routes.
        replicas: names under which its engines joined.
        busy: held while a version is put on it, and while it joins.
        is_joining: it is a join that holds ``busy``.
        may_have_joined: it was asked to join, and its workers have the backend.
        is_removed: it is none of the fleet's any more.
        poisoned: its weights are of no known version; it stays paused until a commit heals it.
        held: it is paused, by this side or by somebody before.
        commit_s: seconds that its last commit took.
        join_error: why it could not join again, the last time that it was absent.
        updates: the threads that take versions to it.
        known_by: monotonic time by which these are through.
    """

    name: str
    client: Any
    replicas: tuple[str, ...] = ()
    busy: threading.Lock = field(default_factory=threading.Lock)
    is_joining: bool = False
    may_have_joined: bool = False
    is_removed: bool = False
    poisoned: bool = False
    held: bool = False
    commit_s: float = 0.0
    join_error: str = ""
    updates: list[threading.Thread] = field(default_factory=list)
    known_by: float = 0.0

    @property
    def pausable(self) -> bool:
        """Whether this side pauses it; otherwise the caller does."""
        return isinstance(self.client, PausableClient)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Have the server to oneself. Waits for an update that is under way, but for no join: False then."""
        while not self.busy.acquire(timeout=_POLL_S):
            if self.is_joining:
                yield False
                return
        try:
            yield True
        finally:
            self.busy.release()

    def resume(self, patience_s: float = CLEANUP_S) -> WsyncError | None:
        """Make it step again, and try so for some seconds. Returns why it does not."""
        if not self.pausable:
            return None
        self.held = True
        end = time.monotonic() + patience_s
        while True:
            try:
                with limited(self.client, CLEANUP_S), named_errors(self, "resume"):
                    self.client.resume()
            except WsyncError as e:
                if time.monotonic() + _RETRY_S > end:
                    return e
                time.sleep(_RETRY_S)
            else:
                self.held = False
                return None

    def leave(self) -> bool:
        """Make its workers leave the trainer; it serves on with what it has. Returns whether it said that they did."""
        leave = getattr(self.client, "shutdown_weight_transfer_engine", None)
        if not self.may_have_joined or not callable(leave):
            return False
        with limited(self.client, CLEANUP_S):
            for is_last in (False, True):
                try:
                    leave()
                except (ConnectError, DeadlineError):  # it is gone; it notices that the trainer is
                    return False
                except Exception:  # too old to have the route; or an update is open, in which vLLM's workers stay
                    if is_last:
                        return False
                    with contextlib.suppress(Exception):
                        finish(self.client, None)
                else:
                    return True
        return False


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


def finish(client: Any, weight_version: str | None) -> None:
    """Close an update. Clients of older versions of vLLM take no label; None is the same as none."""
    if weight_version is None:
        client.finish_weight_update()
    else:
        client.finish_weight_update(weight_version)
