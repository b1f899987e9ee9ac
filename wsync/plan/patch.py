"""Trees after engine ranks left and joined: who stays keeps its place, and only what was lost or is new moves.

A tree leads from island to island, and inside each from one rank, its head, to the others. Where an island is lost, the
first one behind it takes its place; others behind it, and those that are new, are fed by whoever has room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from wsync.plan.flows import LOCAL, Flow, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.route.survey import Family
from wsync.plan.route.trees import Doors, TreeBook
from wsync.plan.types import SOURCE


@dataclass(slots=True, eq=False)
class _Stop:
    """An island on a tree; the root stands for the sender.

    Attributes:
        head: the rank that receives from outside; `_LOST` where it is gone.
        rail: of the hop to it.
        members: the ranks of the island, the head among them.
        before: the stop that feeds this one.
        behind: those that this one feeds.
    """

    head: int
    rail: int
    members: list[int]
    before: _Stop | None
    behind: list[_Stop] = field(default_factory=list)

    def walk(self) -> Iterator[_Stop]:
        """All stops behind this one, in an order in which each comes after the one that feeds it."""
        queue = list(self.behind)
        for stop in queue:
            yield stop
            queue += stop.behind


_LOST = -2


@dataclass(slots=True, eq=False)
class _Plant:
    """One tree, taken apart.

    Attributes:
        root: the sender.
        limbo: feeds what nobody feeds any more.
        is_changed: whether the tree has lost a rank.
        senders: bytes along this tree, by the NICs that their trainer ranks reach.
        zones: where these ranks are.
        nbytes: of all senders.
    """

    root: _Stop
    limbo: _Stop
    is_changed: bool
    senders: dict[tuple[int, ...], int] = field(default_factory=dict)
    zones: set[int] = field(default_factory=set)
    nbytes: int = 0


def patched_trees(
    trees: Sequence[Tree],
    flows: Sequence[Flow],
    kept: Mapping[int, int],
    joining: Sequence[Sequence[int]],
    nodes: Nodes,
    relay: bool,
) -> list[Tree | None]:
    """Every tree with the ranks that are there now, at its old index; None where nobody is left.

    Args:
        trees, flows: of the plan before.
        kept: index of each sink of the plan before that is still there -> its index now.
        joining: for each tree the new sinks that need what travels along it.
        nodes: of the job now. Every sink reaches a NIC.
        relay: whether engine ranks may pass on to other nodes.
    """
    plants = [_take_apart(tree, kept) for tree in trees]
    for flow in flows:
        plant = plants[flow.tree_idx]
        lane = nodes.sources[flow.src_rank]
        plant.senders[lane.reach] = plant.senders.get(lane.reach, 0) + flow.wire_bytes
        plant.zones.add(nodes.zone[lane.node])
        plant.nbytes += flow.wire_bytes
    nursery = _Nursery(nodes, relay)
    for plant in plants:
        nursery.count(plant)
    nursery.floor_s = max((*nursery.out, *nursery.into), default=0.0)
    for plant, new in zip(plants, joining, strict=True):
        nursery.mend(plant, new)
    book = TreeBook(nodes)
    return [
        _put_together(plant, book) if plant.is_changed or new else _renamed(tree, kept)
        for tree, plant, new in zip(trees, plants, joining, strict=True)
    ]


def _take_apart(tree: Tree, kept: Mapping[int, int]) -> _Plant:
    """The stops of a tree, without the ranks that are gone."""
    root, limbo = (_Stop(SOURCE, LOCAL, [], None) for _ in range(2))
    stop_of = {SOURCE: root}
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        stop = stop_of[src]
        if rail != LOCAL or src == SOURCE:
            stop = _Stop(kept.get(dst, _LOST), rail, [], stop)
            stop_of[src].behind.append(stop)
        stop_of[dst] = stop
        if dst in kept:
            stop.members.append(kept[dst])
    is_changed = not all(s in kept for s in tree.sinks)
    for stop in list(root.walk()) if is_changed else ():
        if not stop.members:
            _drop(stop, limbo)
    return _Plant(root, limbo, is_changed)


def _drop(stop: _Stop, limbo: _Stop) -> None:
    """Put the first stop behind a lost one in its place, and the others nowhere."""
    before = stop.before or limbo
    at = before.behind.index(stop)
    before.behind[at : at + 1] = stop.behind[:1]
    limbo.behind += stop.behind[1:]
    for i, heir in enumerate(stop.behind):
        heir.before = limbo if i else before


class _Nursery:
    """Knows what every NIC carries, and finds room.

    Attributes:
        out, into: seconds that each NIC sends and receives.
        floor_s: nothing is late by less than this.
    """

    def __init__(self, nodes: Nodes, relay: bool) -> None:
        self.nodes = nodes
        self.relay = relay
        self.out = [0.0] * len(nodes.nics)
        self.into = [0.0] * len(nodes.nics)
        self.floor_s = 0.0

    def count(self, plant: _Plant) -> None:
        """Add what a tree's hops load, as far as both ends are known; lost heads are replaced first."""
        for stop in (*plant.root.walk(), *plant.limbo.walk()):
            if stop.head == _LOST:
                stop.head = min(stop.members, key=lambda s: (self._into_s(s, stop.rail), s))
            if stop.rail != LOCAL:
                self._receive(stop, plant.nbytes)
        for stop in plant.root.walk():
            self._send(plant, stop)
        for loose in plant.limbo.behind:
            for stop in loose.walk():
                self._send(plant, stop)

    def mend(self, plant: _Plant, new: Sequence[int]) -> None:
        """Feed what nobody feeds, and the islands of new sinks."""
        loose, plant.limbo.behind = plant.limbo.behind, []
        for stop in (*loose, *self._settle(plant, loose, new)):
            stop.before = self._feeder(plant, stop)
            stop.before.behind.append(stop)
            self._send(plant, stop)

    def _settle(self, plant: _Plant, loose: Sequence[_Stop], new: Sequence[int]) -> list[_Stop]:
        """New sinks on islands of the tree join these; the others make stops of their own."""
        here = [s for top in (plant.root, *loose) for s in (top, *top.walk()) if s.members]
        at = {self._island(s.head): s for s in here}
        fresh = []
        for sink in new:
            stop = at.get(self._island(sink))
            if stop is None:
                stop = at[self._island(sink)] = _Stop(_LOST, LOCAL, [], None)
                fresh.append(stop)
            stop.members.append(sink)
        for stop in fresh:
            stop.head, stop.rail = self._door(stop.members)
            self._receive(stop, plant.nbytes)
        return fresh

    def _door(self, members: Sequence[int]) -> tuple[int, int]:
        """The head and the rail of the least busy way into an island."""
        family = Family(tuple(members), (0,), (tuple(members),), (0,), False, 0)
        door = min(Doors(family, self.nodes).ways[0], key=lambda d: self.into[d.nic])
        return door.head, door.rail

    def _feeder(self, plant: _Plant, stop: _Stop) -> _Stop:
        """Who should feed a stop: one of its own zone if there is any, so that no link is crossed again."""
        if not self.relay:
            return plant.root
        depth = {id(plant.root): 0}
        feeders = [plant.root]
        for other in plant.root.walk():
            depth[id(other)] = depth[id(other.before)] + 1
            feeders.append(other)
        zone = self._zone(stop)
        near = [s for s in feeders if self._is_in(plant, s, zone)]
        return min(near or feeders, key=lambda f: (self._late_s(plant, f, stop), depth[id(f)]))

    def _is_in(self, plant: _Plant, feeder: _Stop, zone: int) -> bool:
        if feeder is not plant.root:
            return self._zone(feeder) == zone
        return plant.zones == {zone}

    def _late_s(self, plant: _Plant, feeder: _Stop, stop: _Stop) -> float:
        """When the NICs that feed a stop would be done, if later than all others."""
        if feeder is plant.root:
            busiest = max((self.out[nic] + cost for nic, cost in self._from_senders(plant, stop.rail)), default=0.0)
        else:
            nic = self.nodes.sink_nic(feeder.head, stop.rail)
            busiest = self.out[nic] + self._seconds(nic, plant.nbytes)
        return max(busiest, self.floor_s)

    def _send(self, plant: _Plant, stop: _Stop) -> None:
        """Count the hop to a stop where it leaves."""
        if stop.rail == LOCAL or stop.before is None:
            return
        if stop.before is plant.root:
            for nic, cost in self._from_senders(plant, stop.rail):
                self.out[nic] += cost
        elif stop.before is not plant.limbo:
            nic = self.nodes.sink_nic(stop.before.head, stop.rail)
            self.out[nic] += self._seconds(nic, plant.nbytes)

    def _receive(self, stop: _Stop, nbytes: int) -> None:
        nic = self.nodes.sink_nic(stop.head, stop.rail)
        self.into[nic] += self._seconds(nic, nbytes)

    def _from_senders(self, plant: _Plant, rail: int) -> Iterator[tuple[int, float]]:
        for reach, nbytes in plant.senders.items():
            nic = reach[rail % len(reach)]
            yield nic, self._seconds(nic, nbytes)

    def _into_s(self, sink: int, rail: int) -> float:
        return 0.0 if rail == LOCAL else self.into[self.nodes.sink_nic(sink, rail)]

    def _seconds(self, nic: int, nbytes: int) -> float:
        return nbytes / (self.nodes.nics[nic].rate_gbps * 1e9)

    def _island(self, sink: int) -> int:
        return self.nodes.island[self.nodes.sink_node[sink]]

    def _zone(self, stop: _Stop) -> int:
        return self.nodes.zone[self.nodes.sink_node[stop.head]]


def _put_together(plant: _Plant, book: TreeBook) -> Tree | None:
    hops: list[tuple[int, int]] = []
    rails: list[int] = []
    fan: list[tuple[int, int]] = []
    sinks: list[int] = []
    for stop in plant.root.walk():
        hops.append((stop.before.head if stop.before else SOURCE, stop.head))
        rails.append(stop.rail)
        fan += book.inside(stop.head, tuple(sorted(stop.members)))
        sinks += stop.members
    if not sinks:
        return None
    return Tree(tuple(sorted(sinks)), (*hops, *fan), (*rails, *[LOCAL] * len(fan)))


def _renamed(tree: Tree, kept: Mapping[int, int]) -> Tree:
    names = {**kept, SOURCE: SOURCE}
    hops = tuple((names[src], names[dst]) for src, dst in tree.hops)
    return Tree(tuple(sorted(kept[s] for s in tree.sinks)), hops, tree.rails)
