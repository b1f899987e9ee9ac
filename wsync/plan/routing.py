"""Routing: who sends each group, and along which tree it reaches all who need it."""

from __future__ import annotations

from wsync.plan.flows import LOCAL, DemandGroup, Route, Routing, Share, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.types import SOURCE, PlanOptions


def route(groups: list[DemandGroup], nodes: Nodes, bucket_bytes: int, options: PlanOptions) -> Routing:
    """Share each group evenly among its holders; one sink of each node fans out to the others there."""
    del bucket_bytes, options
    trees: dict[Tree, int] = {}
    routes: list[tuple[Route, ...]] = []
    for group_idx, group in enumerate(groups):
        local: dict[int, list[int]] = {}
        for rank in group.holders:
            local.setdefault(nodes.source_node[rank], []).append(rank)
        by_node: dict[int, list[int]] = {}
        for s in group.sinks:
            node = nodes.sink_node[s]
            by_node.setdefault(node if node in local else -1, []).append(s)
        found = []
        for node, sinks in sorted(by_node.items()):
            holders = group.holders if node < 0 else tuple(local[node])
            count = len(holders)
            shares = []
            for i, rank in enumerate(holders):
                tree_idx = trees.setdefault(_star(tuple(sinks), nodes, group_idx + i), len(trees))
                nbytes = group.nbytes * (i + 1) // count - group.nbytes * i // count
                shares.append(Share(rank, tree_idx, nbytes))
            found.append(Route(tuple(sinks), tuple(shares)))
        routes.append(tuple(found))
    return Routing(list(trees), routes)


def _star(sinks: tuple[int, ...], nodes: Nodes, turn: int) -> Tree:
    by_node: dict[int, list[int]] = {}
    for s in sinks:
        by_node.setdefault(nodes.sink_node[s], []).append(s)
    first: list[tuple[int, int]] = []
    second: list[tuple[int, int]] = []
    for _, members in sorted(by_node.items()):
        head = members[turn % len(members)]
        first.append((SOURCE, head))
        second += [(head, s) for s in members if s != head]
    return Tree(sinks, (*first, *second), (0,) * len(first) + (LOCAL,) * len(second))
