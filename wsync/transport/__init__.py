"""Transports: what moves packed buckets. `loopback` (threads), `shm` (processes of one host), `gloo` (any hosts).

A transport of your own implements `SourceEnd` and `SinkEnd` of `wsync.transport.base` and runs
`wsync.testing.transport_contract` against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from wsync.errors import ConfigError
from wsync.transport.base import SinkEnd, SourceEnd, Staged
from wsync.transport.offers import host_identity

TRANSPORTS = ("loopback", "shm", "gloo")
"""Names that `open_source` and `open_sink` know."""


def open_source(name: str, *, address: str | None = None) -> SourceEnd:
    """A trainer rank's end of the named transport.

    Args:
        name: one of `TRANSPORTS`.
        address: for gloo, the address under which other hosts reach this process; found out where not given.

    Raises:
        ConfigError: the name is unknown.
    """
    if name == "loopback":
        from wsync.transport.loopback import loopback_source

        return loopback_source()
    if name == "shm":
        from wsync.transport.shm import shm_source

        return shm_source()
    if name == "gloo":
        from wsync.transport.gloo import GlooSource

        return GlooSource(address)
    raise _unknown(name)


def open_sink(name: str, *, address: str | None = None) -> SinkEnd:
    """An engine rank's end of the named transport; see `open_source`.

    Raises:
        ConfigError: the name is unknown.
    """
    if name == "loopback":
        from wsync.transport.loopback import loopback_sink

        return loopback_sink()
    if name == "shm":
        from wsync.transport.shm import shm_sink

        return shm_sink()
    if name == "gloo":
        from wsync.transport.gloo import GlooSink

        return GlooSink(address)
    raise _unknown(name)


def choose_transport(hosts: Sequence[str]) -> str:
    """``"shm"`` where all ends give the same `host_identity`, else ``"gloo"``.

    Raises:
        ConfigError: no host is given.
    """
    if not hosts:
        raise ConfigError("no hosts to choose a transport for")
    return "shm" if len(set(hosts)) == 1 else "gloo"


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"unknown transport {name!r}; known: {', '.join(TRANSPORTS)}")


__all__ = [
    "TRANSPORTS",
    "SinkEnd",
    "SourceEnd",
    "Staged",
    "choose_transport",
    "host_identity",
    "open_sink",
    "open_source",
]
