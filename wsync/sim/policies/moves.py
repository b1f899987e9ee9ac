"""What a policy decides, and the trees that most of them send along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from wsync.plan.flows import DemandGroup, Route, Routing, Share, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.types import ALIGNMENT


class Gather(NamedTuple):
    """Bytes that one trainer rank fetches from another before it sends them on."""

    src_rank: int
    dst_rank: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Moves:
    """Everything that a policy moves.

    Attributes:
        routing: who sends what along which tree. A tree reaches the sinks of its hops, whether they need the bytes or
            not: that is the difference to a plan's.
        gathers: from trainer rank to trainer rank, at most one for each pair.
        host_bytes: bytes that each sink copies from host memory to its GPU before it sends them on, by sink.
    """

    routing: Routing
    gathers: tuple[Gather, ...] = ()
    host_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def delivered_bytes(self) -> int:
        """Bytes that arrive at engine ranks, needed or not, each copy counted."""
        trees = self.routing.trees
        return sum(s.nbytes * len(trees[s.tree_idx].hops) for s in shares_of(self.routing))

    @property
    def moved_bytes(self) -> int:
        """Those, and what trainer ranks exchange."""
        return self.delivered_bytes + sum(g.nbytes for g in self.gathers)


Policy = Callable[[Sequence[DemandGroup], Nodes], Moves]


def shares_of(routing: Routing) -> Iterable[Share]:
    """The shares of all groups."""
    for routes in routing.routes:
        for route in routes:
            yield from route.shares


def as_packed(groups: Iterable[DemandGroup]) -> list[DemandGroup]:
    """The groups with every piece rounded up to `ALIGNMENT`, as plans pack it: policies get the same wire."""
    out = []
    for group in groups:
        lots = tuple(lot._replace(nbytes=-(-lot.nbytes // ALIGNMENT) * ALIGNMENT) for lot in group.lots)
        out.append(replace(group, lots=lots, nbytes=sum(lot.nbytes * lot.num_members for lot in lots)))
    return out


def needed_bytes(groups: Iterable[DemandGroup]) -> int:
    """Bytes that engine ranks need, each rank's counted."""
    return sum(g.nbytes * len(g.sinks) for g in groups)


class TreeBook:
    """Trees without duplicates."""

    def __init__(self) -> None:
        self.trees: list[Tree] = []
        self._index: dict[Tree, int] = {}

    def add(self, tree: Tree) -> int:
        """The tree's index."""
        found = self._index.get(tree)
        if found is None:
            found = self._index[tree] = len(self.trees)
            self.trees.append(tree)
        return found


class Sharing:
    """Bytes of one group, collected by sender and tree."""

    def __init__(self) -> None:
        self._nbytes: dict[tuple[int, int], int] = {}

    def add(self, src_rank: int, tree_idx: int, nbytes: int) -> None:
        """Count ``nbytes``; zero is nothing."""
        if nbytes:
            key = (src_rank, tree_idx)
            self._nbytes[key] = self._nbytes.get(key, 0) + nbytes

    def route(self, sinks: tuple[int, ...]) -> Route:
        """All of it, for ``sinks``."""
        return Route(sinks, tuple(Share(src, tree, n) for (src, tree), n in self._nbytes.items()))


class Gathers:
    """Bytes that trainer ranks fetch, by pair."""

    def __init__(self) -> None:
        self._nbytes: dict[tuple[int, int], int] = {}

    def add(self, holders: Sequence[int], dst_rank: int, nbytes: int) -> None:
        """``dst_rank`` has the bytes itself, or fetches them from the first holder."""
        if dst_rank not in holders:
            key = (holders[0], dst_rank)
            self._nbytes[key] = self._nbytes.get(key, 0) + nbytes

    def all(self) -> tuple[Gather, ...]:
        """By pair."""
        return tuple(Gather(src, dst, n) for (src, dst), n in sorted(self._nbytes.items()))
