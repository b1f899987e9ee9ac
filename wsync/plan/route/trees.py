"""Delivery trees of one family: which rank of an island receives, on which rail, and in what order islands pass on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.plan.flows import LOCAL, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.route.survey import Family
from wsync.plan.types import SOURCE


class Door(NamedTuple):
    """Where bytes enter an island: the rank, the rail of the hop to it, and the NIC that this is there."""

    head: int
    rail: int
    nic: int


class Doors:
    """The ways into every island of a family.

    Way ``v`` of an island uses another NIC, and where it can another head, than way ``v + 1``. Way 0 of an island where
    only one rank needs the bytes is that rank's own NIC.

    Args:
        family: that is not local.
        nodes: of the job.

    Attributes:
        ways: for each island its doors.
        count: as many as it takes to use every door of every island.
        nics: ``int64 [count, num_islands]`` indices of the NICs that way v enters by.
        single: every island has one needer, so that way 0 is the straight one.
    """

    def __init__(self, family: Family, nodes: Nodes) -> None:
        self.ways = [_doors(m, nodes) for m in family.members]
        self.count = max(len(w) for w in self.ways)
        self.single = all(len(m) == 1 for m in family.members)
        self.nics: npt.NDArray[np.int64] = np.array(
            [[w[v % len(w)].nic for w in self.ways] for v in range(self.count)], dtype=np.int64
        )

    def at(self, island: int, way: int) -> Door:
        """The door of the island at this position for one way."""
        doors = self.ways[island]
        return doors[way % len(doors)]


def _doors(members: tuple[int, ...], nodes: Nodes) -> list[Door]:
    lanes = {s: nodes.sinks[s] for s in members if nodes.sinks[s].port >= 0}
    nics = sorted({n for lane in lanes.values() for n in lane.reach})
    heads = list(lanes)
    if len(heads) >= len(nics):
        return [_own_door(s, i, nodes) for i, s in enumerate(heads)]
    first = lanes[heads[0]].own
    start = nics.index(first[0]) if len(heads) == 1 and first else 0
    doors = []
    for i in range(len(nics)):
        nic = nics[(start + i) % len(nics)]
        able = [s for s in heads if nic in lanes[s].reach]
        near = [s for s in able if nic in lanes[s].own] or able
        head = near[i % len(near)]
        doors.append(Door(head, lanes[head].reach.index(nic), nic))
    return doors


def _own_door(sink: int, turn: int, nodes: Nodes) -> Door:
    lane = nodes.sinks[sink]
    nics = lane.own or lane.reach
    nic = nics[turn % len(nics)]
    return Door(sink, lane.reach.index(nic), nic)


class TreeBook:
    """All trees of a plan, each once."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.trees: list[Tree] = []
        self._index: dict[Tree, int] = {}
        self._doors: dict[int, Doors] = {}
        self._made: dict[tuple[int, int, int, int], int] = {}

    def doors(self, family: Family) -> Doors:
        """The doors of a family, worked out once."""
        found = self._doors.get(id(family))
        if found is None:
            found = self._doors[id(family)] = Doors(family, self.nodes)
        return found

    def local(self, family: Family, head: int) -> int:
        """Index of the tree inside one island that starts at ``head``."""
        key = (id(family), head, -1, -1)
        found = self._made.get(key)
        if found is None:
            hops = [(SOURCE, head), *self._inside(head, family.members[0])]
            found = self._made[key] = self._add(family, hops, [LOCAL] * len(hops))
        return found

    def remote(self, family: Family, num_chains: int, rotation: int, way: int) -> int:
        """Index of the tree of ``num_chains`` chains through the islands, the first beginning at ``rotation``."""
        key = (id(family), num_chains, rotation, way)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._chains(family, num_chains, rotation, way)
        return found

    def _chains(self, family: Family, num_chains: int, rotation: int, way: int) -> int:
        doors, count = self.doors(family), len(family.islands)
        hops: list[tuple[int, int]] = []
        rails: list[int] = []
        fan: list[tuple[int, int]] = []
        for chain in range(num_chains):
            before = SOURCE
            for at in range(chain * count // num_chains, (chain + 1) * count // num_chains):
                island = (at + rotation) % count
                door = doors.at(island, way)
                hops.append((before, door.head))
                rails.append(door.rail)
                fan += self._inside(door.head, family.members[island])
                before = door.head
        return self._add(family, hops + fan, rails + [LOCAL] * len(fan))

    def _inside(self, head: int, members: tuple[int, ...]) -> list[tuple[int, int]]:
        """From the head to the others of its island: one rank of each other NVLink domain, then inside each."""
        sinks = self.nodes.sinks
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
            first.append((head, others[0]))
            second += [(others[0], s) for s in others[1:]]
        return first + second

    def _add(self, family: Family, hops: list[tuple[int, int]], rails: list[int]) -> int:
        tree = Tree(family.sinks, tuple(hops), tuple(rails))
        found = self._index.setdefault(tree, len(self.trees))
        if found == len(self.trees):
            self.trees.append(tree)
        return found
