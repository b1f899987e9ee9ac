"""How the ends of a gloo group find each other: addresses in the offers, a store on trainer rank 0, one group.

All ends first meet at the store, where waiting can be ended and who is missing can be told; only then do they build the
group, which blocks inside gloo. Both run in a helper thread, so that the caller's wait ends whenever it should.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from wsync.errors import ConnectError, DeadlineError, PeerLostError
from wsync.transport.base import Cancelled, never_cancelled
from wsync.transport.gloo_mesh import Mesh
from wsync.transport.offers import Offer
from wsync.transport.waiting import Patience, remaining_s

LOOPBACK = "127.0.0.1"
_RETRY_S = 0.02
_JOIN_S = 30.0  # for building the group once all ends have met: less only where the deadline is near
_VERDICT_S = 1.0  # how long who failed to join looks for others that failed, and the store outlives a failure


def own_address() -> str:
    """IPv4 address under which other hosts reach this one.

    That of the interface in ``GLOO_SOCKET_IFNAME`` if set, else that of the default route, else loopback.

    Raises:
        ConnectError: the named interface has no address.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface:
            try:
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
            except OSError as error:
                raise ConnectError(f"interface {interface!r} of GLOO_SOCKET_IFNAME has no address: {error}") from error
            return socket.inet_ntoa(found[20:24])
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only asks for the route
            return str(probe.getsockname()[0])
        except OSError:
            return LOOPBACK


class StoreSockets:
    """Ports that trainer rank 0 reserves before it knows which address the others need. Nothing listens there yet."""

    def __init__(self, address: str) -> None:
        """Reserve a port of loopback, and one of ``address``.

        Raises:
            ConnectError: the address is not of this host.
        """
        self._sockets: dict[str, socket.socket] = {}
        for host in dict.fromkeys((LOOPBACK, address)):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._sockets[host] = sock
            try:
                sock.bind((host, 0))
            except OSError as error:
                self.close()
                raise ConnectError(f"the store cannot be bound to {host}: {error}") from error

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """(address, port) pairs, loopback first."""
        return tuple((host, int(sock.getsockname()[1])) for host, sock in self._sockets.items())

    def take(self, host: str) -> int:
        """File descriptor of the socket bound to ``host``; the other one is closed."""
        fd = self._sockets.pop(host).detach()
        self.close()
        return fd

    def close(self) -> None:
        """Give the ports back."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()


def connect_mesh(
    own: Offer,
    sources: Sequence[Offer],
    sinks: Sequence[Offer],
    sockets: StoreSockets | None,
    deadline: float,
    cancelled: Cancelled = never_cancelled,
) -> Mesh:
    """Join the group; returns once every end has.

    Args:
        sockets: trainer rank 0's, None elsewhere.
        deadline: on `time.monotonic`.
        cancelled: called from this thread while it waits; what it raises ends the wait.

    Raises:
        PeerLostError: ends did not come in time, or died meanwhile; the message names them.
        DeadlineError: the store was not there in time.
        ConnectError: the store cannot be reached, or the group not built.
    """
    rendezvous = _Rendezvous(own, sources, sinks, sockets, deadline)
    threading.Thread(target=rendezvous.run, name="wsync-gloo-connect", daemon=True).start()
    patience = Patience(deadline + 2 * _VERDICT_S, cancelled)
    try:
        while not rendezvous.done.wait(patience.slice_s):
            patience.check(lambda: rendezvous.what)
    except BaseException:
        rendezvous.abandon()
        raise
    return rendezvous.mesh()


class _Abandoned(Exception):
    """Nobody waits for the mesh any more."""


class _Rendezvous:
    """One attempt of one end. `run` runs in a thread of its own, the other calls come from the thread that waits."""

    def __init__(
        self,
        own: Offer,
        sources: Sequence[Offer],
        sinks: Sequence[Offer],
        sockets: StoreSockets | None,
        deadline: float,
    ) -> None:
        self._own = own
        self._ends = [*sources, *sinks]
        self._index = own.rank + (len(sources) if own.side == "sink" else 0)
        self._sockets = sockets
        self._deadline = deadline
        one_host = len({offer.host for offer in self._ends}) == 1
        self._address, self._port = sources[0].addresses[0 if one_host else -1]
        self._bind = LOOPBACK if one_host else own.addresses[-1][0]
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._mesh: Mesh | None = None
        self._error: Exception | None = None
        self._store: Any = None
        self.done = threading.Event()

    @property
    def what(self) -> str:
        """What this end is trying, as messages say it."""
        return f"{self._own.label} tried to reach {len(self._ends) - 1} other ends through {self._address}:{self._port}"

    def run(self) -> None:
        try:
            mesh = self._join()
        except Exception as error:
            self._report(error)
            if self._sockets is not None and self._store is not None:
                time.sleep(_VERDICT_S)  # the others ask the store who did not come, and they may be later
            self._store = None
            return
        with self._lock:
            self._mesh = mesh
        if self._stop.is_set():
            self.abandon()
        self.done.set()

    def _report(self, error: Exception) -> None:
        # Frames would keep the store alive, and others would meet where nobody comes any more.
        for part in (error, error.__cause__, error.__context__):
            if part is not None:
                part.__traceback__ = None
        self._error = error
        self.done.set()

    def mesh(self) -> Mesh:
        """The outcome, once ``done``."""
        if self._mesh is not None:
            return self._mesh
        raise self._error if self._error is not None else ConnectError(f"{self.what} and was abandoned")

    def abandon(self) -> None:
        """End the attempt as soon as it can be, and close what comes of it."""
        self._stop.set()
        with self._lock:
            mesh, self._mesh = self._mesh, None
        if mesh is not None:
            mesh.close()

    def _join(self) -> Mesh:
        try:
            store = self._store = self._open_store()
        except (RuntimeError, OSError) as error:
            raise self._failed(error) from error
        try:
            self._meet(store)
            group = self._build_group(store)
        except (RuntimeError, OSError) as error:
            missing = self._never_joined(store)
            if missing:
                raise PeerLostError(f"{self.what}, and {missing} was lost meanwhile: {_reason(error)}") from error
            raise self._failed(error) from error
        store.set(f"joined/{self._index}", b"")
        return Mesh(group, store, [offer.label for offer in self._ends])

    def _open_store(self) -> Any:
        import torch.distributed

        c10d: Any = torch.distributed  # its stubs name neither the stores nor the options
        sockets = self._sockets
        if sockets is None:
            self._await_listener()
        return c10d.TCPStore(
            self._address,
            self._port,
            is_master=sockets is not None,
            timeout=timedelta(seconds=remaining_s(self._deadline)),
            wait_for_workers=False,
            master_listen_fd=sockets.take(self._address) if sockets is not None else None,
        )

    def _await_listener(self) -> None:
        """Wait until somebody listens there: the store's own client may take twice the time it is given."""
        while True:
            try:
                socket.create_connection((self._address, self._port), timeout=remaining_s(self._deadline)).close()
                return
            except OSError:
                if time.monotonic() + _RETRY_S >= self._deadline:
                    raise
            self._pause(_RETRY_S)

    def _meet(self, store: Any) -> None:
        """Wait at the store until all ends are there."""
        store.set(f"here/{self._index}", b"")
        num_here = store.add("here", 1)
        pause_s = 0.002
        while num_here < len(self._ends):
            if time.monotonic() >= self._deadline:
                missing = self._without(store, "here")
                waited_s = time.monotonic() - self._began
                raise PeerLostError(f"{self.what}, gave up after {waited_s:.2f} s: {missing} did not come")
            self._pause(min(pause_s, remaining_s(self._deadline)))
            pause_s = min(2 * pause_s, 0.05)
            num_here = store.add("here", 0)

    def _build_group(self, store: Any) -> Any:
        import torch.distributed

        c10d: Any = torch.distributed
        options = c10d.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=min(_JOIN_S, remaining_s(self._deadline)))
        options._threads = 1
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=self._bind)]
        return c10d.ProcessGroupGloo(c10d.PrefixStore("wsync", store), self._index, len(self._ends), options)

    def _never_joined(self, store: Any) -> str:
        """Who neither joined nor said that it failed; empty where that is nobody, or cannot be told."""
        try:
            store.set(f"joined/{self._index}", b"")
            ends = time.monotonic() + _VERDICT_S
            while (missing := self._without(store, "joined")) and time.monotonic() < ends:
                self._pause(_RETRY_S)
            return missing
        except RuntimeError:
            return self._ends[0].label  # it holds the store

    def _without(self, store: Any, key: str) -> str:
        """Labels of the ends that did not set their ``key``."""
        return ", ".join(offer.label for i, offer in enumerate(self._ends) if not store.check([f"{key}/{i}"]))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Abandoned

    def _failed(self, error: Exception) -> Exception:
        waited_s = time.monotonic() - self._began
        if time.monotonic() >= self._deadline - 2 * _RETRY_S:
            return DeadlineError(f"{self.what}, gave up after {waited_s:.2f} s: {_reason(error)}")
        return ConnectError(f"{self.what} and failed after {waited_s:.2f} s: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
