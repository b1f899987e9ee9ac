"""Alpa's cross-mesh resharding: for every piece the copy whose owner has sent least so far.

Source: ``alpa/pipeline_parallel/cross_mesh_resharding.py`` of ``alpa-projects/alpa``,
``_generate_send_recv_resharding_strategy_by_loads`` and ``_generate_broadcast_resharding_strategy_by_loads``: loads are
bytes of each sending device, the least loaded owner is taken, and the load grows by the slice. Zhuang et al., "On
Optimizing the Communication of Model Parallelism", MLSys 2023, is the broadcast along a chain of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.flows import DemandGroup, Route, Routing
from wsync.plan.nodes import Nodes
from wsync.sim.policies.moves import Moves, Sharing, TreeBook
from wsync.sim.policies.trees import TreeMaker


def alpa_send_recv(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """Every rank that needs a piece gets it straight from the least loaded owner."""
    maker, book = TreeMaker(nodes), TreeBook()
    loads = [0] * len(nodes.source_node)
    return Moves(Routing(book.trees, [_sent(g, loads, maker, book) for g in groups]))


def alpa_broadcast(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """Every piece is broadcast once, from the least loaded owner, along a chain of all nodes that need it."""
    maker, book = TreeMaker(nodes), TreeBook()
    loads = [0] * len(nodes.source_node)
    routes: list[tuple[Route, ...]] = []
    for group in groups:
        sharing = Sharing()
        trees = [book.add(maker.chain(h, group.sinks)) for h in group.holders]
        for lot in group.lots:
            picks = least_loaded([loads[h] for h in group.holders], lot.nbytes, lot.num_members)
            for holder, tree_idx, num_picks in zip(group.holders, trees, picks, strict=True):
                loads[holder] += num_picks * lot.nbytes
                sharing.add(holder, tree_idx, num_picks * lot.nbytes)
        routes.append((sharing.route(group.sinks),))
    return Moves(Routing(book.trees, routes))


def _sent(group: DemandGroup, loads: list[int], maker: TreeMaker, book: TreeBook) -> tuple[Route, ...]:
    """Pieces are dealt to receivers in turn, which leaves every owner the bytes that the greedy choice gives it."""
    sharings = [Sharing() for _ in group.sinks]
    for lot in group.lots:
        picks = least_loaded([loads[h] for h in group.holders], lot.nbytes, lot.num_members * len(group.sinks))
        dealt = 0
        for holder, num_picks in zip(group.holders, picks, strict=True):
            loads[holder] += num_picks * lot.nbytes
            while num_picks:
                receiver, before = divmod(dealt, lot.num_members)
                num = min(num_picks, lot.num_members - before)
                tree_idx = book.add(maker.direct(holder, group.sinks[receiver]))
                sharings[receiver].add(holder, tree_idx, num * lot.nbytes)
                dealt, num_picks = dealt + num, num_picks - num
    return tuple(sharing.route((s,)) for s, sharing in zip(group.sinks, sharings, strict=True))


def least_loaded(loads: Sequence[int], nbytes: int, num_items: int) -> list[int]:
    """How many of ``num_items`` equal items each owner gets, where each goes to the least loaded, the first of equals.

    Item j of owner i is taken at load ``loads[i] + j * nbytes``: the ``num_items`` smallest of these are.
    """
    if not nbytes:
        return [num_items, *([0] * (len(loads) - 1))]
    low, high = min(loads), min(loads) + nbytes * num_items
    while low < high:  # the largest level below which not more than num_items are taken
        level = (low + high + 1) // 2
        if sum(_below(load, level, nbytes) for load in loads) <= num_items:
            low = level
        else:
            high = level - 1
    picks = [_below(load, low, nbytes) for load in loads]
    left = num_items - sum(picks)
    for i, load in enumerate(loads):
        if left and load + picks[i] * nbytes == low:
            picks[i] += 1
            left -= 1
    return picks


def _below(load: int, level: int, nbytes: int) -> int:
    return max(0, -((load - level) // nbytes))
