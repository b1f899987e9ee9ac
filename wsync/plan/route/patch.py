"""Trees after some sinks left or joined, without routing anew: one pass over the hops.

Every sink must reach a NIC: where some do not, who could take a place depends on who else is there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from wsync.plan.flows import LOCAL, Tree
from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.types import SOURCE


def without_sinks(
    trees: Sequence[Tree], nbytes: Sequence[int], nodes: Nodes, lost: Collection[int], *, relay: bool = True
) -> list[Tree | None]:
    """Trees that reach all but some sinks; what these passed on is passed on by those who have sent least.

    The remaining sinks are numbered anew, in their order. A tree that served nobody else is None. Senders and shares
    stay as they are.

    Args:
        trees: before.
        nbytes: that travel along each.
        nodes: of the job before.
        lost: the sinks that left.
        relay: as in `PlanOptions`.
    """
    gone = frozenset(lost)
    number, new_number = 0, {SOURCE: SOURCE}
    for s in range(len(nodes.sinks)):
        if s not in gone:
            new_number[s] = number
            number += 1
    loads = _Loads(nodes)
    for tree, n in zip(trees, nbytes, strict=True):
        loads.count(tree, n, gone)
    out: list[Tree | None] = []
    for tree, n in zip(trees, nbytes, strict=True):
        if not gone.isdisjoint(tree.sinks):
            tree = _pruned(tree, n, gone, loads, relay)
        hops = tuple((new_number[a], new_number[b]) for a, b in tree.hops)
        sinks = tuple(new_number[s] for s in tree.sinks)
        out.append(Tree(sinks, hops, tree.rails) if sinks else None)
    return out


def with_sinks(
    trees: Sequence[Tree], nbytes: Sequence[int], nodes: Nodes, like: Mapping[int, int], *, relay: bool = True
) -> list[Tree]:
    """Trees that reach more sinks, which get what others get, from those who have sent least.

    New sinks on an island where trainer ranks hold what they need should be routed anew, not added: this knows trees,
    not who sends along them.

    Args:
        trees: before, with sinks numbered as in ``nodes``.
        nbytes: that travel along each.
        nodes: of the job with the new sinks.
        like: new sink -> a sink that needs the same.
        relay: as in `PlanOptions`.
    """
    twins: dict[int, list[int]] = {}
    for new, old in sorted(like.items()):
        twins.setdefault(old, []).append(new)
    loads = _Loads(nodes)
    for tree, n in zip(trees, nbytes, strict=True):
        loads.count(tree, n, frozenset())
    out = []
    for turn, (tree, n) in enumerate(zip(trees, nbytes, strict=True)):
        added = [new for s in tree.sinks for new in twins.get(s, ())]
        out.append(_grown(tree, n, added, loads, turn, relay) if added else tree)
    return out


class _Loads:
    """Attoseconds that each sink's NIC is busy with passing on."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.sent = [0] * len(nodes.nics)

    def count(self, tree: Tree, nbytes: int, gone: frozenset[int]) -> None:
        """Add what a tree's sinks pass on to other islands, but for those that are gone."""
        for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
            if rail != LOCAL and src != SOURCE and src not in gone and dst not in gone:
                self.add(src, rail, nbytes)

    def add(self, sink: int, rail: int, nbytes: int) -> None:
        """Count one hop."""
        nic = self.nodes.sink_nic(sink, rail)
        self.sent[nic] += nbytes * byte_cost(self.nodes.nics[nic].rate_gbps)

    def least(self, sinks: Collection[int], rail: int, nbytes: int) -> int:
        """Who of ``sinks`` should make a hop, which is counted."""
        nodes = self.nodes
        # A NIC is as late as it is with this hop: slow ones take fewer.
        best = min(sinks, key=lambda s: (self._after(nodes.sink_nic(s, rail), nbytes), s))
        self.add(best, rail, nbytes)
        return best

    def _after(self, nic: int, nbytes: int) -> int:
        return self.sent[nic] + nbytes * byte_cost(self.nodes.nics[nic].rate_gbps)

    def island(self, sink: int) -> int:
        """Where a sink is."""
        return self.nodes.island[self.nodes.sink_node[sink]]


class _Branches:
    """A tree as it is built."""

    def __init__(self, loads: _Loads, nbytes: int, relay: bool) -> None:
        self.loads = loads
        self.nbytes = nbytes
        self.relay = relay
        self.hops: list[tuple[int, int]] = []
        self.rails: list[int] = []
        self.able: dict[int, int] = {}

    def add(self, src: int, dst: int, rail: int) -> None:
        self.hops.append((src, dst))
        self.rails.append(rail)
        if rail != LOCAL:
            self.able[self.loads.island(dst)] = dst

    def adopt(self, dst: int, rail: int) -> None:
        """Reach another island from one that has the bytes, or from the sender."""
        src = SOURCE
        if self.relay and self.able:
            src = self.loads.least(self.able.values(), rail, self.nbytes)
        self.add(src, dst, rail)

    def tree(self) -> Tree:
        return Tree(tuple(sorted(d for _, d in self.hops)), tuple(self.hops), tuple(self.rails))


def _pruned(tree: Tree, nbytes: int, gone: frozenset[int], loads: _Loads, relay: bool) -> Tree:
    heirs = _heirs(tree, gone, loads)
    # Where a sink that left without an heir was reached from: its sender has one copy less to make, and so makes the
    # first of those that the sink made; others are adopted.
    room: dict[int, int] = {}
    reached: set[int] = set()
    branches = _Branches(loads, nbytes, relay)
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        sender, target = heirs.get(src, src), heirs.get(dst, dst)
        if target in reached:
            continue
        has_room = sender not in gone or sender in room
        if sender in gone and has_room:
            sender = room.pop(sender)
        if target in gone:
            if has_room:
                room[target] = sender
            continue
        reached.add(target)
        if not has_room:
            branches.adopt(target, rail)
            continue
        if rail != LOCAL and sender != SOURCE and (src in gone or dst in gone):
            loads.add(sender, rail, nbytes)
        branches.add(sender, target, rail)
    return branches.tree()


def _heirs(tree: Tree, gone: frozenset[int], loads: _Loads) -> dict[int, int]:
    """For each head that left the one on its island that takes its place, if there is any."""
    members: dict[int, list[int]] = {}
    for s in tree.sinks:
        if s not in gone:
            members.setdefault(loads.island(s), []).append(s)
    heirs = {}
    for _, dst in tree.hops:
        if dst not in gone:
            continue
        left = members.get(loads.island(dst), [])
        if left:
            heirs[dst] = left[0]
    return heirs


def _grown(tree: Tree, nbytes: int, added: Sequence[int], loads: _Loads, turn: int, relay: bool) -> Tree:
    branches = _Branches(loads, nbytes, relay)
    first: dict[int, int] = {}
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        branches.add(src, dst, rail)
        first.setdefault(loads.island(dst), dst)
    by_island: dict[int, list[int]] = {}
    for s in added:
        by_island.setdefault(loads.island(s), []).append(s)
    for island, members in by_island.items():
        head = first.get(island)
        if head is None:
            head = members[turn % len(members)]
            lane = loads.nodes.sinks[head]
            nics = lane.own or lane.reach
            branches.adopt(head, lane.reach.index(nics[turn // len(members) % len(nics)]))
        for s in members:
            if s != head:
                branches.add(head, s, LOCAL)
    return branches.tree()
