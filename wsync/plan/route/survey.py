"""What has to be carried where: every demand group cut into legs, by where its bytes already are.

A node or NVLink domain that holds the bytes is served from within. What other islands need comes from a holder of their
own zone where there is one, so that no byte crosses a shared link that need not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wsync.errors import ConfigError
from wsync.plan.flows import DemandGroup
from wsync.plan.nodes import Nodes

ANY = -1
"""Holders of every zone."""


@dataclass(eq=False, slots=True)
class Family:
    """Sinks that are served together.

    Attributes:
        sinks: ascending.
        islands: that they are on, zones in one piece.
        members: the sinks of each island.
        zone: of the islands; `ANY` for a local family.
        local: whether the senders are on the (only) island themselves.
        nbytes: that it needs in all.
    """

    sinks: tuple[int, ...]
    islands: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    zone: int
    local: bool
    nbytes: int = 0


@dataclass(eq=False, slots=True)
class Senders:
    """Trainer ranks that could send a leg, and for legs that leave the island the ports that they could use."""

    ranks: tuple[int, ...]
    by_port: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Leg:
    """A group's bytes on the way to one family."""

    group_idx: int
    family: Family
    senders: Senders
    nbytes: int


@dataclass(eq=False, slots=True)
class _Holders:
    """One set of holders: on which islands and in which zones."""

    ranks: tuple[int, ...]
    islands: dict[int, Senders]
    zones: dict[int, Senders]
    key: tuple[tuple[int, ...], tuple[int, ...]]


class Survey:
    """Cuts groups into legs.

    Args:
        nodes: of the job.

    Attributes:
        legs: of all groups so far, in order of group.
        families: that the legs refer to, in order of first use.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.legs: list[Leg] = []
        self.families: list[Family] = []
        self._holders: dict[tuple[int, ...], _Holders] = {}
        self._family: dict[tuple[tuple[int, ...], bool], Family] = {}
        self._split: dict[tuple[object, tuple[int, ...]], list[tuple[Family, int]]] = {}

    def add(self, groups: Sequence[DemandGroup]) -> None:
        """Add the legs of ``groups``.

        Raises:
            ConfigError: no path leads from any holder of a group to one of its needers; both nodes are named.
        """
        for group_idx, group in enumerate(groups):
            holders = self._holders.get(group.holders) or self._add_holders(group.holders)
            split = self._split.get((holders.key, group.sinks))
            if split is None:
                split = self._split[(holders.key, group.sinks)] = self._cut(holders, group.sinks)
            for family, where in split:
                senders = holders.islands[family.islands[0]] if family.local else holders.zones[where]
                if not senders.by_port and not family.local:
                    raise self._no_path(holders.ranks[0], family.sinks[0])
                family.nbytes += group.nbytes
                self.legs.append(Leg(group_idx, family, senders, group.nbytes))

    def _add_holders(self, ranks: tuple[int, ...]) -> _Holders:
        nodes = self.nodes
        islands: dict[int, list[int]] = {}
        zones: dict[int, list[int]] = {ANY: list(ranks)}
        for rank in ranks:
            node = nodes.source_node[rank]
            islands.setdefault(nodes.island[node], []).append(rank)
            if nodes.sources[rank].port >= 0:
                zones.setdefault(nodes.zone[node], []).append(rank)
        found = _Holders(
            ranks,
            {i: Senders(tuple(r)) for i, r in islands.items()},
            {z: self._senders(r) for z, r in zones.items()},
            (tuple(sorted(islands)), tuple(sorted(zones))),
        )
        self._holders[ranks] = found
        return found

    def _senders(self, ranks: list[int]) -> Senders:
        by_port: dict[int, list[int]] = {}
        for rank in ranks:
            port = self.nodes.sources[rank].port
            if port >= 0:
                by_port.setdefault(port, []).append(rank)
        return Senders(tuple(ranks), {p: tuple(r) for p, r in sorted(by_port.items())})

    def _cut(self, holders: _Holders, sinks: tuple[int, ...]) -> list[tuple[Family, int]]:
        """The families of one set of sinks, each with the zone whose holders serve it."""
        nodes = self.nodes
        local: dict[int, list[int]] = {}
        remote: dict[int, list[int]] = {}
        for sink in sinks:
            node = nodes.sink_node[sink]
            if nodes.island[node] in holders.islands:
                local.setdefault(nodes.island[node], []).append(sink)
            else:
                remote.setdefault(nodes.zone[node], []).append(sink)
        out = [(self._intern(tuple(s), True), ANY) for _, s in sorted(local.items())]
        for zone, members in sorted(remote.items()):
            out.append((self._intern(tuple(members), False), zone if zone in holders.zones else ANY))
        return out

    def _intern(self, sinks: tuple[int, ...], local: bool) -> Family:
        found = self._family.get((sinks, local))
        if found is not None:
            return found
        nodes = self.nodes
        islands: dict[int, list[int]] = {}
        for sink in sinks:
            islands.setdefault(nodes.island[nodes.sink_node[sink]], []).append(sink)
        if not local:
            for members in islands.values():
                if all(nodes.sinks[s].port < 0 for s in members):
                    raise self._cut_off(members[0])
        family = Family(
            sinks,
            tuple(islands),
            tuple(tuple(m) for m in islands.values()),
            ANY if local else nodes.zone[nodes.sink_node[sinks[0]]],
            local,
        )
        self.families.append(family)
        self._family[(sinks, local)] = family
        return family

    def _no_path(self, rank: int, sink: int) -> ConfigError:
        nodes = self.nodes
        here, there = nodes.source_node[rank], nodes.sink_node[sink]
        return ConfigError(
            f"no path from node {nodes.names[here]!r}, where trainer rank {rank} holds bytes, to node "
            f"{nodes.names[there]!r}, where sink {sink} needs them: {self._why(here)}",
            hint="give the group a nic that this GPU reaches, or place holders and needers on one node",
        )

    def _cut_off(self, sink: int) -> ConfigError:
        nodes = self.nodes
        there = nodes.sink_node[sink]
        other = next((n for i, n in enumerate(nodes.names) if i != there), nodes.names[there])
        return ConfigError(
            f"no path from any holder (such as on node {other!r}) to node {nodes.names[there]!r}, where sink {sink} "
            f"needs bytes: {self._why(there)}",
            hint="give the group a nic that this GPU reaches, or place holders and needers on one node",
        )

    def _why(self, node: int) -> str:
        group = self.nodes.groups[node]
        if not group.nics:
            return f"its group {group.name!r} has 0 nics"
        return f"its group {group.name!r} has {len(group.nics)} nics, but the rank's GPU reaches none of them"
