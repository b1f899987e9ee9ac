"""What has to be carried where: every demand group cut into legs, by where its bytes already are.

A node or NVLink domain that holds the bytes is served from within: a sink whose GPU has them by that rank, others by
the nearest. What other islands need comes from a holder of their own zone where there is one, so that no byte crosses a
shared link that need not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.plan.flows import DemandGroup
from wsync.plan.nodes import Nodes, byte_cost

ANY = -1
"""Holders of every zone."""


class Mode(Enum):
    """Who serves which zones.

    NEAREST: holders in the zone where there are any, else all; each zone for itself. EACH: all holders; each zone for
    itself. APART: all holders; zones without holders together, so that they can pass bytes on to each other. SIDES: all
    holders; zones together that have their nearest holders in one zone. TOGETHER: all holders; all zones together.
    """

    NEAREST = 0
    EACH = 1
    APART = 2
    SIDES = 3
    TOGETHER = 4


@dataclass(eq=False, slots=True)
class Family:
    """Sinks that are served together.

    Attributes:
        sinks: ascending.
        islands: that they are on, zones in one piece.
        members: the sinks of each island.
        zones: of each island; islands of one zone follow each other.
        local: whether the senders are on the (only) island themselves.
        number: in order of first use.
        nbytes: that it needs in all.
    """

    sinks: tuple[int, ...]
    islands: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    zones: tuple[int, ...]
    local: bool
    number: int
    nbytes: int = 0


@dataclass(eq=False, slots=True)
class Senders:
    """Trainer ranks that could send a leg, and for legs that leave the island the ports that they could use."""

    ranks: tuple[int, ...]
    by_port: dict[int, tuple[int, ...]] = field(default_factory=dict)


class Leg(NamedTuple):
    """A group's bytes on the way to one family."""

    group_idx: int
    family: Family
    senders: Senders
    nbytes: int


@dataclass(eq=False, slots=True)
class Bundle:
    """All legs of one family that the same ports can send.

    Attributes:
        family: that they go to.
        ports: that they can leave by, ascending; none if the family is local.
        legs: their indices.
        nbytes: of all of them.
    """

    family: Family
    ports: tuple[int, ...]
    legs: list[int] = field(default_factory=list)
    nbytes: int = 0


@dataclass(eq=False, slots=True)
class _Holders:
    """One set of holders: on which islands and in which zones."""

    ranks: tuple[int, ...]
    islands: dict[int, Senders]
    zones: dict[int, Senders]
    splits: dict[tuple[int, ...], list[tuple[Bundle, Senders]]] = field(default_factory=dict)


class Survey:
    """Cuts groups into legs.

    Args:
        nodes: of the job.
        mode: who serves which zones.

    Attributes:
        legs: of all groups so far, in order of group.
        bundles: of the legs, in order of first use.
    """

    def __init__(self, nodes: Nodes, mode: Mode = Mode.NEAREST) -> None:
        self.nodes = nodes
        self.mode = mode
        self.legs: list[Leg] = []
        self.bundles: list[Bundle] = []
        self._holders: dict[tuple[int, ...], _Holders] = {}
        self._families: dict[tuple[tuple[int, ...], bool], Family] = {}
        self._bundles: dict[tuple[int, tuple[int, ...]], Bundle] = {}
        self._apart: dict[tuple[int, ...], set[int]] = {}
        self._remote: dict[tuple[int, ...], list[tuple[int, Family]]] = {}

    def add(self, groups: Sequence[DemandGroup]) -> None:
        """Add the legs of ``groups``.

        Raises:
            ConfigError: no path leads from any holder of a group to one of its needers; both nodes are named.
        """
        legs = self.legs
        for group_idx, group in enumerate(groups):
            holders = self._holders.get(group.holders) or self._add_holders(group.holders)
            split = holders.splits.get(group.sinks)
            if split is None:
                split = holders.splits[group.sinks] = self._cut(holders, group.sinks)
            for bundle, senders in split:
                bundle.family.nbytes += group.nbytes
                bundle.nbytes += group.nbytes
                bundle.legs.append(len(legs))
                legs.append(Leg(group_idx, bundle.family, senders, group.nbytes))

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
            ranks, {i: Senders(tuple(r)) for i, r in islands.items()}, {z: self._senders(r) for z, r in zones.items()}
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

    def _cut(self, holders: _Holders, sinks: tuple[int, ...]) -> list[tuple[Bundle, Senders]]:
        """Where one set of sinks is served from."""
        nodes = self.nodes
        if self.mode is Mode.NEAREST:
            found = self._apart.get(sinks)
            if found is None:
                found = self._apart[sinks] = {nodes.island[nodes.sink_node[s]] for s in sinks}
            # Most groups have no needer where they have holders: their families depend on the needers alone.
            if found.isdisjoint(holders.islands):
                families = self._remote.get(sinks)
                if families is None:
                    by_zone: dict[int, list[int]] = {}
                    for s in sinks:
                        by_zone.setdefault(nodes.zone[nodes.sink_node[s]], []).append(s)
                    self._check_reach(holders.ranks[0], sinks)
                    families = [(z, self._intern(tuple(m), False)) for z, m in sorted(by_zone.items())]
                    self._remote[sinks] = families
                return [self._to(holders, zone, family) for zone, family in families]
        local: dict[tuple[int, ...], list[int]] = {}
        remote: dict[int, list[int]] = {}
        for sink in sinks:
            node = nodes.sink_node[sink]
            here = holders.islands.get(nodes.island[node])
            if here is not None:
                local.setdefault(self._nearest(here.ranks, sink), []).append(sink)
            else:
                zone = nodes.zone[node]
                remote.setdefault(self._served(holders, zone), []).append(sink)
        out = []
        for ranks, members in sorted(local.items()):
            out.append((self._bundle(self._intern(tuple(members), True), ()), Senders(ranks)))
        for zone, members in sorted(remote.items()):
            self._check_reach(holders.ranks[0], members)
            out.append(self._to(holders, zone, self._intern(tuple(members), False)))
        return out

    def _to(self, holders: _Holders, zone: int, family: Family) -> tuple[Bundle, Senders]:
        """Who serves a remote family."""
        senders = holders.zones[ANY]
        if self.mode is Mode.NEAREST:
            senders = holders.zones.get(zone, senders)
        if not senders.by_port:
            rank = holders.ranks[0]
            raise self._no_path(rank, family.sinks[0], self.nodes.source_node[rank])
        return self._bundle(family, tuple(senders.by_port)), senders

    def _served(self, holders: _Holders, zone: int) -> int:
        """Zones of equal number are served together."""
        if self.mode is Mode.TOGETHER or (self.mode is Mode.APART and zone not in holders.zones):
            return ANY
        if self.mode is Mode.SIDES:
            return min((z for z in holders.zones if z != ANY), key=lambda z: (self._way(z, zone), z), default=ANY)
        return zone

    def _way(self, a: int, b: int) -> int:
        """What a byte takes on the links from one zone to another, one after the other."""
        links = self.nodes.cluster.links
        return sum(byte_cost(links[i // 2].rate_gbps) for i in self.nodes.zones.crossed[a][b])

    def _nearest(self, ranks: tuple[int, ...], sink: int) -> tuple[int, ...]:
        """Of the holders on a sink's island those on its GPU; else in its NVLink domain; else on its node; else all."""
        nodes, there = self.nodes, self.nodes.sinks[sink]
        lanes = [(r, nodes.sources[r]) for r in ranks]
        on_node = [(r, x) for r, x in lanes if x.node == there.node]
        on_gpu = tuple(r for r, x in on_node if x.gpu == there.gpu >= 0)
        if on_gpu:
            return on_gpu
        if there.domain >= 0 and nodes.groups[there.node].nodes_per_domain > 1:
            return ranks
        in_domain = tuple(r for r, x in on_node if x.domain == there.domain >= 0)
        return in_domain or tuple(r for r, _ in on_node) or ranks

    def _bundle(self, family: Family, ports: tuple[int, ...]) -> Bundle:
        key = (family.number, ports)
        found = self._bundles.get(key)
        if found is None:
            found = self._bundles[key] = Bundle(family, ports)
            self.bundles.append(found)
        return found

    def _intern(self, sinks: tuple[int, ...], local: bool) -> Family:
        found = self._families.get((sinks, local))
        if found is not None:
            return found
        nodes = self.nodes
        islands: dict[tuple[int, int], list[int]] = {}
        for sink in sinks:
            node = nodes.sink_node[sink]
            islands.setdefault((nodes.zone[node], nodes.island[node]), []).append(sink)
        order = sorted(islands, key=lambda key: key[0])
        found = self._families[(sinks, local)] = Family(
            sinks,
            tuple(island for _, island in order),
            tuple(tuple(islands[key]) for key in order),
            tuple(zone for zone, _ in order),
            local,
            len(self._families),
        )
        return found

    def _check_reach(self, rank: int, members: Sequence[int]) -> None:
        """Refuse engine ranks of which an island has none with a NIC."""
        nodes = self.nodes
        by_island: dict[int, list[int]] = {}
        for s in members:
            by_island.setdefault(nodes.island[nodes.sink_node[s]], []).append(s)
        for found in by_island.values():
            if all(nodes.sinks[s].port < 0 for s in found):
                raise self._no_path(rank, found[0], nodes.sink_node[found[0]])

    def _no_path(self, rank: int, sink: int, culprit: int) -> ConfigError:
        nodes = self.nodes
        here, there = nodes.source_node[rank], nodes.sink_node[sink]
        group = nodes.groups[culprit]
        why = f"node {nodes.names[culprit]!r} of group {group.name!r} has {len(group.nics)} nics"
        if group.nics:
            why += ", but the rank's GPU reaches none of them"
        return ConfigError(
            f"no path from node {nodes.names[here]!r}, where trainer rank {rank} holds bytes, to node "
            f"{nodes.names[there]!r}, where sink {sink} needs them: {why}",
            hint="give the group a nic that this GPU reaches, or place holders and needers on one node",
        )
