"""Demand summed up by where bytes are and where they have to be: what every cut counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wsync.plan.flows import DemandGroup
from wsync.plan.nodes import Nodes
from wsync.plan.places import Lane, Place


class Flux(NamedTuple):
    """Bytes by the islands that hold and that need them, as bit sets."""

    held: int
    needed: int
    nbytes: int


@dataclass(slots=True, eq=False)
class _Ranks:
    """Ranks of one side: on which islands and GPUs they are, and by which ports they can leave."""

    ranks: tuple[int, ...]
    islands: int
    places: frozenset[Place]
    ports: tuple[int, ...]


@dataclass(slots=True)
class Tally:
    """Bytes that no plan can avoid, by where they have to pass.

    Attributes:
        flux: by islands.
        sink_bytes: that each sink installs.
        sink_in: of those, what its own GPU does not hold.
        needed: bytes that a set of sinks needs and that are on none of their islands, by set.
        ports_out: bytes that leave an island where no needer is, by the ports that their holders reach.
        rank_out: bytes that only this trainer rank holds and that another GPU needs.
        packed: bytes read and written to pack what only the ranks of a set hold, by set.
        memory: bytes through the memory of each node without GPUs.
        gathered: bytes of weights that are packed from host memory, by the GPUs of those that hold them, all offloaded.
    """

    flux: list[Flux] = field(default_factory=list)
    sink_bytes: list[int] = field(default_factory=list)
    sink_in: list[int] = field(default_factory=list)
    needed: dict[tuple[int, ...], int] = field(default_factory=dict)
    ports_out: dict[tuple[int, ...], int] = field(default_factory=dict)
    rank_out: list[int] = field(default_factory=list)
    packed: dict[tuple[int, ...], int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    gathered: dict[frozenset[Place], int] = field(default_factory=dict)


def tally(
    groups: Sequence[DemandGroup],
    nodes: Nodes,
    nbytes: Sequence[int] | None = None,
    packed_bytes: Sequence[int] | None = None,
    host_bytes: Sequence[int] | None = None,
) -> Tally:
    """Sum up ``groups``, with ``nbytes`` in place of their own where given."""
    counter = _Counter(nodes)
    if host_bytes is not None and nodes.has_offloaded:
        counter.count_gathered(groups, host_bytes)
    return counter.count(groups, nbytes, packed_bytes)


class _Counter:
    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.total = Tally(
            sink_bytes=[0] * len(nodes.sinks),
            sink_in=[0] * len(nodes.sinks),
            rank_out=[0] * len(nodes.sources),
            memory=[0] * len(nodes.names),
        )
        self._holders: dict[tuple[int, ...], _Ranks] = {}
        self._sinks: dict[tuple[int, ...], _Ranks] = {}

    def count(
        self, groups: Sequence[DemandGroup], nbytes: Sequence[int] | None, packed_bytes: Sequence[int] | None
    ) -> Tally:
        total = self.total
        flux: dict[tuple[int, int], int] = {}
        by_sinks: dict[tuple[int, ...], int] = {}
        away: dict[tuple[int, tuple[int, ...]], int] = {}
        for i, group in enumerate(groups):
            w = group.nbytes if nbytes is None else nbytes[i]
            held = self._holders.get(group.holders) or self._add(group.holders, self.nodes.sources, self._holders)
            need = self._sinks.get(group.sinks) or self._add(group.sinks, self.nodes.sinks, self._sinks)
            key = (held.islands, need.islands)
            flux[key] = flux.get(key, 0) + w
            by_sinks[group.sinks] = by_sinks.get(group.sinks, 0) + w
            if need.islands & ~held.islands:
                where = (held.islands, group.sinks)
                away[where] = away.get(where, 0) + w
                if not held.islands & need.islands:
                    total.ports_out[held.ports] = total.ports_out.get(held.ports, 0) + w
            if held.islands & need.islands and held.places & need.places:
                self._on_device(held, need, w)
            if len(group.holders) == 1 and (need.places - held.places or not held.places):
                total.rank_out[group.holders[0]] += w
            if packed_bytes is not None:
                total.packed[group.holders] = total.packed.get(group.holders, 0) + packed_bytes[i]
        total.flux = [Flux(h, n, w) for (h, n), w in flux.items()]
        self._count_sinks(by_sinks)
        self._count_needed(away)
        self._count_memory()
        return total

    def count_gathered(self, groups: Sequence[DemandGroup], host_bytes: Sequence[int]) -> None:
        """Weights of which some holder has them on its GPU need not be gathered."""
        gathered, lanes = self.total.gathered, self.nodes.sources
        places_of: dict[tuple[int, ...], frozenset[Place]] = {}
        for group, nbytes in zip(groups, host_bytes, strict=True):
            places = places_of.get(group.holders)
            if places is None:
                held = [lanes[r] for r in group.holders]
                away = all(lane.offloaded for lane in held)
                places = places_of[group.holders] = frozenset(Place(x.node, x.gpu) for x in held if away)
            if places and nbytes:
                gathered[places] = gathered.get(places, 0) + nbytes

    def _add(self, ranks: tuple[int, ...], lanes: Sequence[Lane], known: dict[tuple[int, ...], _Ranks]) -> _Ranks:
        islands, places, ports = 0, set(), set()
        for lane in (lanes[r] for r in ranks):
            islands |= 1 << self.nodes.island[lane.node]
            ports.add(lane.port)
            if lane.gpu >= 0:
                places.add(Place(lane.node, lane.gpu))
        found = known[ranks] = _Ranks(ranks, islands, frozenset(places), tuple(sorted(ports)))
        return found

    def _on_device(self, held: _Ranks, need: _Ranks, nbytes: int) -> None:
        """Sinks whose own GPU holds the bytes need no port for them."""
        for s in need.ranks:
            lane = self.nodes.sinks[s]
            if Place(lane.node, lane.gpu) in held.places:
                self.total.sink_in[s] -= nbytes

    def _count_sinks(self, by_sinks: dict[tuple[int, ...], int]) -> None:
        for sinks, nbytes in by_sinks.items():
            for s in sinks:
                self.total.sink_bytes[s] += nbytes
                self.total.sink_in[s] += nbytes

    def _count_needed(self, away: dict[tuple[int, tuple[int, ...]], int]) -> None:
        nodes, needed = self.nodes, self.total.needed
        for (held, sinks), nbytes in away.items():
            by_island: dict[int, list[int]] = {}
            for s in sinks:
                island = nodes.island[nodes.sink_node[s]]
                if not held >> island & 1:
                    by_island.setdefault(island, []).append(nodes.sinks[s].port)
            for ports in by_island.values():
                key = tuple(sorted(set(ports)))
                needed[key] = needed.get(key, 0) + nbytes

    def _count_memory(self) -> None:
        nodes = self.nodes
        for s, nbytes in enumerate(self.total.sink_bytes):
            self.total.memory[nodes.sink_node[s]] += nbytes
        for flux in self.total.flux:
            if flux.held & (flux.held - 1) == 0:
                island = flux.held.bit_length() - 1
                members = [n for n, i in enumerate(nodes.island) if i == island]
                if len(members) == 1:
                    self.total.memory[members[0]] += flux.nbytes
