"""Trees of the kinds that peers use: a star of direct sends, a chain over nodes with a fan-out in each."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.flows import LOCAL, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.types import SOURCE


def positions(node_of: Sequence[int]) -> list[int]:
    """For each rank of a side how many ranks of that side stand before it on its node: its GPU there."""
    seen: dict[int, int] = {}
    out = []
    for node in node_of:
        out.append(seen.get(node, 0))
        seen[node] = out[-1] + 1
    return out


class TreeMaker:
    """Makes trees for the nodes of one job. Every hop between nodes takes the receiver's own rail."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self._gpu = positions(nodes.sink_node)

    def rail(self, sink_idx: int) -> int:
        """The rail next to a sink's GPU."""
        num_nics = len(self.nodes.groups[self.nodes.sink_node[sink_idx]].nics)
        return self._gpu[sink_idx] % num_nics if num_nics else LOCAL

    def domain(self, sink_idx: int) -> int:
        """Sinks of one domain reach each other without the network."""
        return self.nodes.sink_node[sink_idx]

    def domains(self, sinks: Sequence[int]) -> list[list[int]]:
        """The sinks by domain, both in order of appearance."""
        found: dict[int, list[int]] = {}
        for sink_idx in sinks:
            found.setdefault(self.domain(sink_idx), []).append(sink_idx)
        return list(found.values())

    def direct(self, sinks: Sequence[int]) -> Tree:
        """The sender sends to every sink itself."""
        return _tree([(SOURCE, s, self.rail(s)) for s in sinks])

    def chain(self, sinks: Sequence[int], head: int | None = None) -> Tree:
        """From domain to domain, each passing it on, and a fan-out inside each.

        Args:
            sinks: whom it reaches.
            head: whom the sender sends to; that one's domain comes first and the others follow in a circle. Domains are
                entered at the sink of the head's position, if they have one there. None for the first sink.
        """
        domains = self.domains(sinks)
        first = 0
        if head is not None:
            first = next(i for i, d in enumerate(domains) if head in d)
        position = self._gpu[sinks[0] if head is None else head]
        hops = []
        before = SOURCE
        for members in (*domains[first:], *domains[:first]):
            entry = next((s for s in members if self._gpu[s] == position), members[0])
            hops.append((before, entry, self.rail(entry)))
            hops += [(entry, s, LOCAL) for s in members if s != entry]
            before = entry
        return _tree(hops)


def _tree(hops: list[tuple[int, int, int]]) -> Tree:
    return Tree(
        tuple(sorted(dst for _, dst, _ in hops)),
        tuple((src, dst) for src, dst, _ in hops),
        tuple(rail for *_, rail in hops),
    )
