"""`Fleet`: trainer rank 0 and the vLLM servers that it feeds."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wsync.errors import ConfigError, StateError, WsyncError
from wsync.integrations.vllm.choices import pause_policy, reachable_store, worker_options
from wsync.integrations.vllm.client import HTTPServer, WeightSyncClient
from wsync.integrations.vllm.joining import Joining, in_parallel
from wsync.integrations.vllm.reports import LOST, FleetReport, ServerReport
from wsync.integrations.vllm.server import Server
from wsync.integrations.vllm.together import agree
from wsync.integrations.vllm.update import ServerUpdate

if TYPE_CHECKING:
    from wsync.api import Publication, PublishReport, Source

_log = logging.getLogger(__name__)

_GRACE_S = 15.0
"""Seconds past a publish's deadline in which a server that failed is brought to a known state."""
_CLOSE_S = 1.0
"""Seconds that a server which joins is waited for when it is let go. The join itself lets it go when it is through."""


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
            ``join_deadline_s`` (seconds for a worker to be accepted, where not ``deadline_s``).
        deadline_s: seconds for the servers to join, and of a publish that gives none.

    A server that is paused when it joins, by a trainer that died on it or by hand, is resumed by the first version that
    it commits, and not before. A program that ends without `close` leaves no server paused that may go on.

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
        if isinstance(servers, (str, bytes)):
            raise ConfigError(f"servers is a list of servers, got the text {servers!r}")
        if names is not None and len(names) != len(servers):
            raise ConfigError(f"names has {len(names)} names for {len(servers)} servers")
        why = "trainer rank 0 could not make its servers join; its own error says why"
        try:
            # The other ranks must not publish while rank 0 waits for servers, or gave up.
            agree(source.rank, source.world_size, lambda: self._begin(servers, names, store), why)
        except BaseException:
            in_parallel(Server.leave, list(self._servers.values()))  # nobody would commit what they stage
            raise
        _settled_at_exit().add(self)

    def _begin(self, servers: Sequence[str | WeightSyncClient], names: Sequence[str] | None, store: str | None) -> None:
        if self._source.rank == 0:
            address = reachable_store(store or self._source.store)
            self._joining = Joining(self._source, address, self._options, self._deadline_s)
            self._joining.join_all([self._enter(s, names[i] if names else None) for i, s in enumerate(servers)])

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
            self._joining.join(entered)
        except BaseException:
            del self._servers[entered.name]
            entered.leave()
            raise
        return entered.name

    def remove(self, name: str) -> None:
        """Let a server go: it leaves the trainer where it can be reached, and serves on with what it has.

        A version that is on its way to it gets there first, or does not by its deadline.

        Raises:
            ConfigError: there is no such server.
        """
        if self._source.rank != 0:
            return
        if name not in self._servers:
            raise ConfigError(f"there is no server {name!r}; there are {sorted(self._servers)}")
        _let_go(self._servers.pop(name))

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

    # ---- publishing

    def publish(
        self, version: int, *, min_replicas: int | None = None, deadline_s: float | None = None
    ) -> FleetPublication:
        """Publish the weights of ``source`` as ``version``, and take every server to it. On every trainer rank.

        Returns at once. A server is paused only when all that its replicas need is staged and verified, and each one as
        soon as that is so: no server waits for another. A server that is not there (it restarted) is asked to join
        again, which stops it while it records, and takes part from the next publish on.

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
            server.updates = [t for t in server.updates if t.is_alive()] + [thread]
            server.known_by = publication.deadline + _GRACE_S
            thread.start()
        return FleetPublication(publication, updates)

    def _take_to(self, server: Server, update: ServerUpdate) -> None:
        if len(self._joining.missing(server)) == len(server.replicas):
            self._rejoin(server)
        update.run()
        if update.has_left or (update.is_absent and self._joining.missing(server)):
            self._rejoin(server)

    def _rejoin(self, server: Server) -> None:
        threading.Thread(
            target=self._joining.rejoin, args=(server,), name=f"wsync-join-{server.name}", daemon=True
        ).start()

    # ---- end

    def close(self) -> None:
        """Let all servers go. They serve on with what they have. The Source stays open. May be called twice.

        Versions that are on their way get to their servers first, or do not by their deadlines.
        """
        servers, self._servers = list(self._servers.values()), {}
        in_parallel(_let_go, servers)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _settle(self) -> None:
        in_parallel(_settle, list(self._servers.values()))


@functools.cache
def _settled_at_exit() -> weakref.WeakSet[Fleet]:
    """Fleets that leave no server paused behind when the interpreter ends.

    Made with the first fleet: what is registered later runs earlier, so their Sources are closed after this.
    """
    fleets: weakref.WeakSet[Fleet] = weakref.WeakSet()

    def settle() -> None:
        for fleet in list(fleets):
            fleet._settle()

    atexit.register(settle)
    return fleets


def _settle(server: Server) -> None:
    """Wait for the versions that are on their way to a server, and leave it paused only if it is poisoned."""
    for thread in server.updates:
        thread.join(max(0.0, server.known_by - time.monotonic()))
    if not server.busy.acquire(timeout=_CLOSE_S):
        return
    try:
        if server.held and not server.poisoned:
            server.resume()
        if server.held:
            _log.warning("server %r is left paused: only a version that it commits resumes it", server.name)
    finally:
        server.busy.release()


def _let_go(server: Server) -> None:
    _settle(server)
    server.is_removed = True
    server.leave()


def _outcome(publication: Publication) -> tuple[PublishReport | None, WsyncError | None]:
    try:
        return publication.wait_committed(), None
    except WsyncError as e:
        return None, e
