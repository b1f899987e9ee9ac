"""`Fleet`: trainer rank 0 and the vLLM servers that it feeds."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wsync.errors import ConfigError, StateError, TransportError, WsyncError
from wsync.integrations.vllm.choices import pause_policy, reachable_store, worker_options
from wsync.integrations.vllm.client import HTTPServer, WeightSyncClient
from wsync.integrations.vllm.reports import LOST, FleetReport, ServerReport
from wsync.integrations.vllm.together import all_succeeded, ranks_meet
from wsync.integrations.vllm.update import Server, ServerUpdate, limited, named_errors

if TYPE_CHECKING:
    from wsync.api import Publication, PublishReport, Source
    from wsync.session.membership import ReplicaStatus

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
_GRACE_S = 15.0
"""Seconds past a publish's deadline in which a server that failed is brought to a known state."""


class FleetPublication:
    """One publish to all servers, on one trainer rank. Made by `Fleet.publish`.

    Attributes:
        version: what is published.
    """

    def __init__(self, publication: Publication, updates: Mapping[str, tuple[ServerUpdate, threading.Thread]]) -> None:
        self.version = publication.version
        self._publication = publication
        self._updates = updates

    @property
    def released(self) -> bool:
        """Whether the optimizer may write again."""
        return self._publication.released

    def wait_released(self) -> None:
        """As `Publication.wait_released`: the optimizer may write again."""
        self._publication.wait_released()

    def wait_committed(self) -> FleetReport:
        """Wait until every server serves the version, or is known not to.

        Servers that failed do not raise here while enough replicas committed: see ``report.servers``.

        Raises:
            CommitError: fewer replicas than needed committed; `servers` says what became of each server.
            WsyncError: the error that ended the publish.
        """
        report, error = _outcome(self._publication)
        servers = self.servers  # also after an error: no server may be left paused behind the caller's back
        if error is not None:
            raise error
        if report is None:
            raise StateError(f"version {self.version} ended without a report")
        return FleetReport(self.version, report, servers)

    @property
    def servers(self) -> dict[str, ServerReport]:
        """What became of each server. Waits for those that are under way."""
        end = self._publication.deadline + _GRACE_S
        reports = {}
        for name, (update, thread) in self._updates.items():
            thread.join(max(0.0, end - time.monotonic()))
            reports[name] = update.report or ServerReport(
                name, LOST, error=f"it did not answer within {_GRACE_S:g} s of the deadline of version {self.version}"
            )
        return reports


class Fleet:
    """The vLLM servers that one trainer feeds. Make it on every trainer rank; only rank 0 talks to the servers.

    The call returns when all of them have joined, on every rank where torch.distributed connects the ranks.

    Args:
        source: of this rank.
        servers: URLs, `HTTPServer`, `InProcessServer` or any object with the methods of vLLM's
            ``VLLMWeightSyncClient``. One that has no ``pause`` and ``resume`` is not paused: the caller does that.
        pause: what a server does with running requests while it commits: ``"keep"`` freezes them, ``"abort"`` ends
            them, ``"wait"`` lets them finish first (the deadline must allow for that).
        caches: ``"recompute"`` (default with ``"keep"``) computes the keys and values of frozen requests again with the
            new weights and drops the prefix cache; ``"keep"`` keeps all; ``"drop"`` (default with ``"abort"`` and
            ``"wait"``) drops the prefix cache when nothing runs.
        names: of the servers; None calls them ``engine-0``, ``engine-1``, ...
        key_file: path of the job's key on the servers' machines; None lets them take it from ``WSYNC_KEY``. The key
            itself is never sent.
        store: address of the trainer as the servers reach it; None takes the Source's.
        recipes: recipe by checkpoint name, for all servers.
        options: further fields of `WsyncInitInfo` for all servers: ``allow_missing``, ``num_threads``, ``mode``,
            ``join_deadline_s``.
        deadline_s: seconds for the servers to join, and of a publish that gives none.

    Raises:
        ConfigError: bad arguments; or a server whose workers have no backend ``wsync``.
        TransportError: a server that cannot be reached, or said no; the message has what it said.
        DeadlineError: not all joined in time.

    Threads: calls are for one thread; each server has one of its own during a publish.
    """

    def __init__(
        self,
        source: Source,
        servers: Sequence[str | WeightSyncClient],
        *,
        pause: str = "keep",
        caches: str | None = None,
        names: Sequence[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        store: str | None = None,
        recipes: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        deadline_s: float = 60.0,
    ) -> None:
        self._policy = pause_policy(pause, caches)
        self._source = source
        self._deadline_s = deadline_s
        self._options = worker_options(options or {})
        if key_file is not None:
            self._options["key_file"] = os.path.abspath(key_file)
        if recipes is not None:
            self._options["recipes"] = dict(recipes)
        self._servers: dict[str, Server] = {}
        self._num_named = 0
        self._last: FleetReport | None = None
        self._store = ""
        if isinstance(servers, (str, bytes)):
            raise ConfigError(f"servers is a list of servers, got the text {servers!r}")
        if names is not None and len(names) != len(servers):
            raise ConfigError(f"names has {len(names)} names for {len(servers)} servers")
        self._together(lambda: self._begin(servers, names, store))

    def _begin(self, servers: Sequence[str | WeightSyncClient], names: Sequence[str] | None, store: str | None) -> None:
        if self._source.rank == 0:
            self._store = reachable_store(store or self._source.store)
            self._join_all([self._enter(s, names[i] if names else None) for i, s in enumerate(servers)])

    def _together(self, begin: Callable[[], None]) -> None:
        """All trainer ranks begin, or none: the others must not publish while rank 0 waits for servers, or gave up."""
        if not ranks_meet(self._source.rank, self._source.world_size):
            return begin()
        try:
            begin()
        except BaseException:
            all_succeeded(False)
            raise
        if not all_succeeded(True):
            raise TransportError("trainer rank 0 could not make its servers join; its own error says why")

    # ---- who is there

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the servers; empty on trainer ranks other than 0."""
        return tuple(self._servers)

    def add(self, server: str | WeightSyncClient, name: str | None = None) -> str:
        """Take in one more server, which joins now. Returns its name. Does nothing on ranks other than 0.

        Raises:
            WsyncError: as for the constructor; the server is not taken in then.
        """
        if self._source.rank != 0:
            return name or ""
        entered = self._enter(server, name)
        try:
            self._join(entered)
        except BaseException:
            del self._servers[entered.name]
            raise
        return entered.name

    def remove(self, name: str) -> None:
        """Let a server go: it leaves the trainer where it can be reached, and serves on with what it has.

        Raises:
            ConfigError: there is no such server.
        """
        if self._source.rank != 0:
            return
        if name not in self._servers:
            raise ConfigError(f"there is no server {name!r}; there are {sorted(self._servers)}")
        _dismiss(self._servers.pop(name))

    def _enter(self, server: str | WeightSyncClient, name: str | None) -> Server:
        client = HTTPServer(server) if isinstance(server, str) else server
        lacking = [
            m for m in ("init_weight_transfer_engine", "update_weights") if not callable(getattr(client, m, None))
        ]
        if lacking:
            raise ConfigError(f"a server is a URL or has vLLM's client methods; {client!r} lacks {lacking}")
        if name is None:
            name = f"engine-{self._num_named}"
        self._num_named += 1
        if not re.fullmatch(r"[^\s/]+", name):
            raise ConfigError(f"the name of a server has no '/' and no blanks, got {name!r}")
        if name in self._servers:
            raise ConfigError(f"two servers have the name {name!r}")
        self._servers[name] = Server(name, client)
        return self._servers[name]

    def _join_all(self, servers: Sequence[Server]) -> None:
        errors: dict[str, Exception] = {}

        def join(server: Server) -> None:
            try:
                self._join(server)
            except Exception as e:
                errors[server.name] = e

        _in_parallel(join, servers)
        for name in sorted(errors):
            raise errors[name]

    def _join(self, server: Server) -> None:
        """Make the workers of a server join, and look whether the trainer sees them."""
        info = {
            "store": self._store,
            "replica": server.name,
            "num_engines": _num_engines(server),
            "join_deadline_s": self._deadline_s,
            **self._options,
        }
        # A worker that gives up says more than a call that does.
        try:
            with (
                limited(server.client, self._deadline_s + _APPEAR_S),
                named_errors(server, "init_weight_transfer_engine"),
            ):
                server.client.init_weight_transfer_engine(info)
        except TransportError as e:
            if any(words in e.message for words in _OTHER_BACKEND):
                e.hint = _BACKEND_HINT
            raise
        server.replicas = self._await_replicas(server, time.monotonic() + _APPEAR_S)

    def _await_replicas(self, server: Server, end: float) -> tuple[str, ...]:
        """The server's replicas, once the trainer sees all ranks of them."""
        pattern = re.compile(re.escape(server.name) + r"(\.dp\d+)?")
        while True:
            known = {n: status for n, status in sorted(self._source.replicas().items()) if pattern.fullmatch(n)}
            if known and all(status.complete for status in known.values()):
                return tuple(known)
            if time.monotonic() > end:
                raise self._not_joined(server, known)
            time.sleep(_POLL_S)

    def _not_joined(self, server: Server, known: Mapping[str, ReplicaStatus]) -> ConfigError:
        refused = [why for status in known.values() for why in status.refused.values()]
        partly = [f"{n} has ranks {list(s.joined)} of {s.world_size}" for n, s in known.items() if s.joined]
        seen = "; ".join(refused or partly) or f"no replica of it (there are {sorted(self._source.replicas())})"
        return ConfigError(
            f"server {server.name!r} said that its workers joined, but the trainer at {self._store} sees {seen}",
            hint=_BACKEND_HINT,
        )

    # ---- publishing

    def publish(
        self, version: int, *, min_replicas: int | None = None, deadline_s: float | None = None
    ) -> FleetPublication:
        """Publish the weights of ``source`` as ``version``, and take every server to it. On every trainer rank.

        Returns at once. A server is paused only when all that its replicas need is staged and verified, and each one as
        soon as that is so: no server waits for another. A server that was not there (it restarted) joins again, and
        takes part in the next publish.

        Args:
            version, min_replicas: as for `Source.publish`.
            deadline_s: seconds for the whole publish; None takes the fleet's.

        Raises:
            WsyncError: as `Source.publish`.
        """
        seconds = self._deadline_s if deadline_s is None else deadline_s
        publication = self._source.publish(version, min_replicas=min_replicas, deadline_s=seconds)
        updates = {}
        for server in self._servers.values():
            update = ServerUpdate(server, self._source, publication, self._policy)
            thread = threading.Thread(
                target=self._take_to, args=(server, update), name=f"wsync-{server.name}", daemon=True
            )
            updates[server.name] = (update, thread)
            thread.start()
        return FleetPublication(publication, updates)

    def _take_to(self, server: Server, update: ServerUpdate) -> None:
        with server.busy:
            update.run()
        if update.is_absent:
            threading.Thread(target=self._rejoin, args=(server,), name=f"wsync-join-{server.name}", daemon=True).start()

    def _rejoin(self, server: Server) -> None:
        """A server that restarted knows nothing of the trainer."""
        if not server.busy.acquire(blocking=False):
            return  # it is being taken to a newer version, or joins already
        try:
            self._join(server)
            server.join_error = ""
        except Exception as e:  # the next publish reports it absent again, and tries again
            server.join_error = f"{type(e).__name__}: {e}"
        finally:
            server.busy.release()

    # ---- end

    def close(self) -> None:
        """Let all servers go. They serve on with what they have. The Source stays open. May be called twice."""
        servers, self._servers = list(self._servers.values()), {}
        _in_parallel(_dismiss, servers)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _outcome(publication: Publication) -> tuple[PublishReport | None, WsyncError | None]:
    try:
        return publication.wait_committed(), None
    except WsyncError as e:
        return None, e


def _num_engines(server: Server) -> int:
    """Data-parallel engines of a server that can be asked."""
    world_size = getattr(server.client, "world_size", None)
    if not callable(world_size):
        return 1
    with limited(server.client, _APPEAR_S), named_errors(server, "get_world_size"):
        return max(1, int(world_size(True)) // max(1, int(world_size(False))))


def _dismiss(server: Server) -> None:
    leave = getattr(server.client, "shutdown_weight_transfer_engine", None)
    if not callable(leave):
        return
    with limited(server.client, _APPEAR_S):
        try:
            leave()
        except Exception:  # it is gone, or is too old to have the route; it notices that the trainer is gone
            return


def _in_parallel(task: Callable[[Server], None], servers: Sequence[Server]) -> None:
    threads = [threading.Thread(target=task, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
