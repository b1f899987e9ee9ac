"""How servers join a trainer: the first time, and again when they restarted."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wsync.errors import ConfigError, TransportError, WsyncError
from wsync.integrations.vllm.server import Server, limited, named_errors

if TYPE_CHECKING:
    from wsync.api import Source
    from wsync.session.membership import ReplicaStatus

_log = logging.getLogger(__name__)

_APPEAR_S = 10.0
"""Seconds for the ranks of a server to be seen after it said that it joined: those of before a trainer's restart come
back by themselves, with their next ping."""
_POLL_S = 0.05
_OTHER_BACKEND = ("Weight transfer not configured", "Invalid init_info for")
"""What vLLM says where its workers have no backend, or another one."""
_BACKEND_HINT = (
    'start the server with --weight-transfer-config \'{"backend": "wsync"}\', and with a VLLM_PLUGINS that is unset or '
    "names wsync"
)


class Joining:
    """Makes servers join one trainer. On trainer rank 0.

    Args:
        source: of the trainer.
        store: its address, as the servers reach it.
        options: further fields of `WsyncInitInfo`.
        deadline_s: seconds for a server to join.

    Threads: any, as long as they do not join the same server.
    """

    def __init__(self, source: Source, store: str, options: Mapping[str, Any], deadline_s: float) -> None:
        self._source = source
        self._store = store
        self._options = {"join_deadline_s": deadline_s, **options}
        # A worker that gives up says more than a call that does.
        self._limit_s = max(deadline_s, self._options["join_deadline_s"]) + _APPEAR_S

    def join_all(self, servers: Sequence[Server]) -> None:
        """Make servers join at the same time.

        Raises:
            WsyncError: as `join`, of the first server that could not, by name.
        """
        errors: dict[str, Exception] = {}

        def join(server: Server) -> None:
            try:
                self.join(server)
            except Exception as e:
                errors[server.name] = e

        in_parallel(join, servers)
        for name in sorted(errors):
            raise errors[name]

    def join(self, server: Server) -> None:
        """Make the workers of a server join, and look whether the trainer sees them, and whether the server stands.

        Raises:
            ConfigError: the trainer does not see them.
            TransportError: the server said no, or cannot be reached.
            DeadlineError: it did not answer in time.
        """
        self._ask(server)
        known = self._await_replicas(server)
        if not _complete(known) and any(status.refused for status in known.values()):
            # Workers of before a trainer's restart came back by themselves, and this trainer's tensors are others: what
            # those mean for the engine can only be recorded on its own thread, where this call gets them.
            self._ask(server, afresh=True)
            known = self._await_replicas(server)
        if not _complete(known):
            raise self._not_joined(server, known)
        server.replicas = tuple(known)
        _look_at_pause(server)

    def rejoin(self, server: Server) -> None:
        """Make a server join that restarted and knows nothing of the trainer. Never raises; not twice at a time."""
        if not server.busy.acquire(blocking=False):
            return  # it is being taken to a version, or joins already
        server.is_joining = True
        try:
            if not server.is_removed:
                self.join(server)
            server.join_error = ""
        except Exception as e:  # the next publish reports it absent again, and tries again
            server.join_error = f"{type(e).__name__}: {e}"
        finally:
            if server.is_removed:
                server.leave()
            server.is_joining = False
            server.busy.release()

    def missing(self, server: Server) -> list[str]:
        """Replicas of the server of which the trainer lacks ranks now."""
        try:
            known = self._source.replicas()
        except WsyncError:  # the Source is closed: there is nothing to join
            return []
        return [name for name in server.replicas if name not in known or not known[name].complete]

    def _ask(self, server: Server, *, afresh: bool = False) -> None:
        info = {"store": self._store, "replica": server.name, "num_engines": _num_engines(server), **self._options}
        if afresh:
            info["afresh"] = True
        server.may_have_joined = True
        try:
            with limited(server.client, self._limit_s), named_errors(server, "init_weight_transfer_engine"):
                server.client.init_weight_transfer_engine(info)
        except TransportError as e:
            if any(words in e.message for words in _OTHER_BACKEND):
                e.hint = _BACKEND_HINT
                server.may_have_joined = False
            raise

    def _await_replicas(self, server: Server) -> dict[str, ReplicaStatus]:
        """The server's replicas, once the trainer sees all ranks of them or turned one away, or after a while."""
        pattern = re.compile(re.escape(server.name) + r"(\.dp\d+)?")
        end = time.monotonic() + _APPEAR_S
        while True:
            known = {n: status for n, status in sorted(self._source.replicas().items()) if pattern.fullmatch(n)}
            is_over = _complete(known) or any(status.refused for status in known.values())
            if is_over or time.monotonic() > end:
                return known
            time.sleep(_POLL_S)

    def _not_joined(self, server: Server, known: Mapping[str, ReplicaStatus]) -> ConfigError:
        refused = [why for status in known.values() for why in status.refused.values()]
        partly = [f"{n} has ranks {list(s.joined)} of {s.world_size}" for n, s in known.items() if s.joined]
        seen = "; ".join(refused or partly) or f"no replica of it (there are {sorted(self._source.replicas())})"
        return ConfigError(
            f"server {server.name!r} said that its workers joined, but the trainer at {self._store} sees {seen}",
            hint="" if refused or partly else _BACKEND_HINT,
        )


def _complete(known: Mapping[str, ReplicaStatus]) -> bool:
    return bool(known) and all(status.complete for status in known.values())


def _num_engines(server: Server) -> int:
    """Data-parallel engines of a server that can be asked."""
    world_size = getattr(server.client, "world_size", None)
    if not callable(world_size):
        return 1
    with limited(server.client, _APPEAR_S), named_errors(server, "get_world_size"):
        return max(1, int(world_size(True)) // max(1, int(world_size(False))))


def _look_at_pause(server: Server) -> None:
    """A server that stands when it joins: somebody died on it half way, maybe, and its weights may be of no version."""
    is_paused = getattr(server.client, "is_paused", None)
    if not server.pausable or not callable(is_paused):
        return
    try:
        with limited(server.client, _APPEAR_S), named_errors(server, "is_paused"):
            stands = bool(is_paused())
    except WsyncError:  # an older server, without that route
        return
    is_known = server.held  # this side left it so, and knows why
    server.held = stands
    server.poisoned = stands and (server.poisoned or not is_known)
    if stands and not is_known:
        _log.warning(
            "server %r is paused already as it joins (by a trainer that died?): the first version that it commits "
            "resumes it",
            server.name,
        )


def in_parallel(task: Callable[[Server], object], servers: Sequence[Server]) -> None:
    """Do it for all servers, and wait."""
    threads = []
    for server in servers:
        thread = threading.Thread(target=task, args=(server,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, and begins no thread any more
            task(server)
        else:
            threads.append(thread)
    for thread in threads:
        thread.join()
