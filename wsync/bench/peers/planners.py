"""The planners by name, and which packages each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from wsync.bench.peers.awex import plan_awex
from wsync.bench.peers.case import PeerCase, PeerPlan
from wsync.bench.peers.mooncake import plan_mooncake


@dataclass(frozen=True)
class Peer:
    """A planner of another system.

    Attributes:
        name: that tables show.
        package: distribution whose version is recorded.
        modules: that have to be importable.
        plan: runs it; imports it inside.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    plan: Callable[[PeerCase], Callable[[], PeerPlan]]


PEERS = (
    Peer("Mooncake mooncake.reshard", "mooncake-transfer-engine-non-cuda", ("mooncake.reshard",), plan_mooncake),
    Peer("awex TransferPlanBuilder", "awex", ("awex", "megatron.core"), plan_awex),
)
"""Every planner that installs and plans without a GPU."""


def missing_of(peer: Peer) -> list[str]:
    """The modules that are not installed."""
    return [name for name in peer.modules if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
