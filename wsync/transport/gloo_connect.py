"""How the ends of a gloo group find each other: addresses in the offers, a store on trainer rank 0, one group."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from wsync.errors import ConnectError, DeadlineError
from wsync.transport.gloo_mesh import Mesh
from wsync.transport.offers import Offer
from wsync.transport.waiting import remaining_s

LOOPBACK = "127.0.0.1"
_RETRY_S = 0.02


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


def _await_listener(address: str, port: int, deadline: float) -> None:
    """Wait until somebody listens there: the store's own client may take twice the time it is given."""
    while True:
        try:
            socket.create_connection((address, port), timeout=remaining_s(deadline)).close()
            return
        except OSError:
            if time.monotonic() + _RETRY_S >= deadline:
                raise
            time.sleep(_RETRY_S)


def connect_mesh(
    own: Offer, sources: Sequence[Offer], sinks: Sequence[Offer], sockets: StoreSockets | None, deadline: float
) -> Mesh:
    """Join the group; returns once every end has.

    Args:
        sockets: trainer rank 0's, None elsewhere.
        deadline: on `time.monotonic`.

    Raises:
        DeadlineError: not every end came in time.
        ConnectError: the store cannot be reached.
    """
    import torch.distributed

    c10d: Any = torch.distributed  # its stubs name neither the stores nor the options

    ends = [*sources, *sinks]
    index = own.rank + (len(sources) if own.side == "sink" else 0)
    one_host = len({offer.host for offer in ends}) == 1
    store_address, store_port = sources[0].addresses[0 if one_host else -1]
    bind = LOOPBACK if one_host else (own.addresses[-1][0])
    began = time.monotonic()
    try:
        if sockets is None:
            _await_listener(store_address, store_port, deadline)
        store: Any = c10d.TCPStore(
            store_address,
            store_port,
            is_master=sockets is not None,
            timeout=timedelta(seconds=remaining_s(deadline)),
            wait_for_workers=False,
            master_listen_fd=sockets.take(store_address) if sockets is not None else None,
        )
        options = c10d.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=remaining_s(deadline))
        options._threads = 1
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=bind)]
        group = c10d.ProcessGroupGloo(c10d.PrefixStore("wsync", store), index, len(ends), options)
    except (RuntimeError, OSError) as error:
        waited_s = time.monotonic() - began
        what = f"{own.label} tried to reach {len(ends) - 1} other ends through {store_address}:{store_port}"
        reason = str(error).splitlines()[0]
        if time.monotonic() >= deadline - 2 * _RETRY_S:
            raise DeadlineError(f"{what}, gave up after {waited_s:.2f} s: {reason}") from error
        raise ConnectError(f"{what} and failed after {waited_s:.2f} s: {reason}") from error
    return Mesh(group, store, [offer.label for offer in ends])
