"""Trees of the kinds that peers use: a star of direct sends, a chain over nodes with a fan-out in each."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.flows import LOCAL, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.types import SOURCE


class TreeMaker:
    """Makes trees for the nodes of one job. Every hop between islands takes the receiver's own rail."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def rail(self, sink_idx: int) -> int:
        """The rail of the NIC next to a sink's GPU."""
        lane = self.nodes.sinks[sink_idx]
        return lane.reach.index(lane.own[0]) if lane.own else 0

    def island(self, sink_idx: int) -> int:
        """Sinks of one island reach each other without the network."""
        return self.nodes.island[self.nodes.sink_node[sink_idx]]

    def islands(self, sinks: Sequence[int]) -> list[list[int]]:
        """The sinks by island, both in order of appearance."""
        found: dict[int, list[int]] = {}
        for sink_idx in sinks:
            found.setdefault(self.island(sink_idx), []).append(sink_idx)
        return list(found.values())

    def direct(self, src_rank: int, sink_idx: int) -> Tree:
        """The sender sends to one sink."""
        return _tree([(SOURCE, sink_idx, self._from(src_rank, sink_idx))])

    def chain(self, src_rank: int, sinks: Sequence[int], head: int | None = None) -> Tree:
        """From island to island, each passing it on, and a fan-out inside each.

        Args:
            src_rank: who sends.
            sinks: whom it reaches.
            head: whom the sender sends to; that one's island comes first and the others follow in a circle. Islands are
                entered at the sink of the head's position, if they have one there. None for the first sink, or the
                first on the sender's own island where there is one.
        """
        islands = self.islands(sinks)
        if head is None:
            home = self.nodes.island[self.nodes.source_node[src_rank]]
            head = next((s for s in sinks if self.island(s) == home), sinks[0])
        first = next(i for i, members in enumerate(islands) if head in members)
        position = self.nodes.sinks[head].gpu
        hops = []
        before = SOURCE
        for members in (*islands[first:], *islands[:first]):
            same = (s for s in members if self.nodes.sinks[s].gpu == position)
            entry = head if head in members else next(same, members[0])
            hops.append((before, entry, self._from(src_rank, entry) if before == SOURCE else self.rail(entry)))
            hops += [(entry, s, LOCAL) for s in members if s != entry]
            before = entry
        return _tree(hops)

    def _from(self, src_rank: int, sink_idx: int) -> int:
        """The rail from a trainer rank."""
        home = self.nodes.island[self.nodes.source_node[src_rank]]
        return LOCAL if home == self.island(sink_idx) else self.rail(sink_idx)


def _tree(hops: list[tuple[int, int, int]]) -> Tree:
    return Tree(
        tuple(sorted(dst for _, dst, _ in hops)),
        tuple((src, dst) for src, dst, _ in hops),
        tuple(rail for *_, rail in hops),
    )
