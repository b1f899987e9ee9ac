"""Delivery trees of one family: which rank of an island receives, on which rail, and in what order islands pass on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wsync.plan.flows import LOCAL, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.route.survey import Family
from wsync.plan.types import SOURCE


class Door(NamedTuple):
    """Where bytes enter an island: the rank, the rail of the hop to it, and the NIC that this is there."""

    head: int
    rail: int
    nic: int


MAX_WAYS = 64
MAX_SKEWED_ISLANDS = 3
"""Ways that enter islands on different rails are tried for families of so few islands."""


class Doors:
    """The ways into every island of a family.

    Way 0 of a family with one needer on each island is straight: to the needers' own NICs. Each other way enters all
    islands by NICs of equal number, and by another one than the way before, or where all NICs are used at another rank;
    families of few islands have ways that enter each island by another one, too. As rails are counted at both ends,
    ways beyond those of an island go on to other NICs of the sender.

    Args:
        family: that is not local.
        nodes: of the job.

    Attributes:
        count: how many ways use every door of every island.
        single: every island has one needer, so that way 0 is the straight one.
    """

    def __init__(self, family: Family, nodes: Nodes) -> None:
        self.nodes = nodes
        self.islands = [_doors(m, nodes) for m in family.members]
        self.count = max(len(w) for w in self.islands)
        self.single = all(len(m) == 1 for m in family.members)
        self._straight = [self._own(m[0], w) for m, w in zip(family.members, self.islands, strict=True)]

    def _own(self, sink: int, doors: list[Door]) -> Door:
        own = self.nodes.sinks[sink].own
        return next((d for d in doors if d.head == sink and d.nic in own), doors[0])

    def num_ways(self, num_nics: int) -> int:
        """How many ways there are for a sender that reaches ``num_nics``."""
        count = max(self.count, num_nics)
        if 1 < len(self.islands) <= MAX_SKEWED_ISLANDS:
            count *= max(1, min(self.count, MAX_WAYS // count))
        return count + self.single

    def at(self, island: int, way: int, num_nics: int) -> Door:
        """The door of the island at this position for one way of a sender that reaches ``num_nics``."""
        if self.single:
            if not way:
                return self._straight[island]
            way -= 1
        skew, turn = divmod(way, max(self.count, num_nics))
        doors = self.islands[island]
        door = doors[(turn + skew * island) % len(doors)]
        size = len(self.nodes.sinks[door.head].reach)
        return door._replace(rail=door.rail + turn // size * size)


def _doors(members: tuple[int, ...], nodes: Nodes) -> list[Door]:
    """One door for each NIC that the members reach, and where there are more members than NICs one for each of them."""
    lanes = {s: nodes.sinks[s] for s in members if nodes.sinks[s].port >= 0}
    nics = sorted({n for lane in lanes.values() for n in lane.reach})
    heads = list(lanes)
    near = {
        nic: [s for s in heads if nic in lanes[s].own] or [s for s in heads if nic in lanes[s].reach] for nic in nics
    }
    doors = []
    for i in range(max(len(nics), len(heads))):
        nic = nics[i % len(nics)]
        able = near[nic]
        head = able[(i // len(nics) + (i if len(able) == len(heads) else 0)) % len(able)]
        doors.append(Door(head, lanes[head].reach.index(nic), nic))
    return doors


class TreeBook:
    """All trees of a plan, each once."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.trees: list[Tree] = []
        self._index: dict[Tree, int] = {}
        self._doors: dict[int, Doors] = {}
        self._made: dict[tuple[object, ...], int] = {}

    def doors(self, family: Family) -> Doors:
        """The doors of a family, worked out once."""
        found = self._doors.get(family.number)
        if found is None:
            found = self._doors[family.number] = Doors(family, self.nodes)
        return found

    def local(self, family: Family, head: int) -> int:
        """Index of the tree inside one island that starts at ``head``."""
        key = (family.number, head)
        found = self._made.get(key)
        if found is None:
            hops = [(SOURCE, head), *self.inside(head, family.members[0])]
            found = self._made[key] = self._add(family, hops, [LOCAL] * len(hops))
        return found

    def remote(self, family: Family, edges: tuple[tuple[int, int], ...], way: int, num_nics: int) -> int:
        """Index of the tree whose hops between islands are ``edges``, by position, as `shapes.tree_of` makes them."""
        key = (family.number, way, num_nics, edges)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(family, edges, way, num_nics)
        return found

    def _make(self, family: Family, edges: Sequence[tuple[int, int]], way: int, num_nics: int) -> int:
        doors = self.doors(family)
        at = [doors.at(i, way, num_nics) for i in range(len(family.islands))]
        hops: list[tuple[int, int]] = []
        rails: list[int] = []
        fan: list[tuple[int, int]] = []
        for before, island in edges:
            door = at[island]
            hops.append((SOURCE if before < 0 else at[before].head, door.head))
            rails.append(door.rail)
            fan += self.inside(door.head, family.members[island])
        return self._add(family, hops + fan, rails + [LOCAL] * len(fan))

    def inside(self, head: int, members: tuple[int, ...]) -> list[tuple[int, int]]:
        """From the head to the others of its island: one rank of each other NVLink domain, then inside each.

        Heads of one domain go to different ranks of another one where it has several.
        """
        sinks = self.nodes.sinks
        turn = [s for s in members if sinks[s].domain == sinks[head].domain].index(head)
        domains: dict[tuple[int, int], list[int]] = {}
        home = sinks[head].domain
        for s in members:
            if s != head:
                domain = sinks[s].domain
                # Without NVLink all are reached alike; a domain of the head's own number is one with it in an island.
                domains.setdefault((domain, s) if domain < 0 else (domain, -1), []).append(s)
        first: list[tuple[int, int]] = []
        second: list[tuple[int, int]] = []
        for (domain, _), others in domains.items():
            if domain == home and domain >= 0:
                first += [(head, s) for s in others]
                continue
            entry = others[turn % len(others)]
            first.append((head, entry))
            second += [(entry, s) for s in others if s != entry]
        return first + second

    def _add(self, family: Family, hops: list[tuple[int, int]], rails: list[int]) -> int:
        tree = Tree(family.sinks, tuple(hops), tuple(rails))
        found = self._index.setdefault(tree, len(self.trees))
        if found == len(self.trees):
            self.trees.append(tree)
        return found
