"""Replicas paired with replicas: every engine replica is fed by one of the trainer's, straight to each of its ranks."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.flows import DemandGroup, Route, Routing
from wsync.plan.nodes import Nodes
from wsync.sim.policies.moves import Moves, Sharing, TreeBook
from wsync.sim.policies.trees import TreeMaker


def round_robin(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """The i-th rank that needs a piece gets it from the trainer's copy number i modulo the number of copies.

    Nothing is shared between ranks of a node, nothing is relayed.

    Source: awex 0.9.0, ``TransferPlanBuilder._build_parameter_communication_plan`` (replicas assigned by modulo, every
    overlap of shards is one operation); Mooncake ``mooncake.reshard.weight`` does the same by ``target_dp`` modulo the
    number of complete source replicas.
    """
    maker, book = TreeMaker(nodes), TreeBook()
    return Moves(Routing(book.trees, [tuple(_pairs(g, maker, book)) for g in groups]))


def _pairs(group: DemandGroup, maker: TreeMaker, book: TreeBook) -> list[Route]:
    out = []
    for i, sink_idx in enumerate(group.sinks):
        sharing = Sharing()
        src_rank = group.holders[i % len(group.holders)]
        sharing.add(src_rank, book.add(maker.direct(src_rank, sink_idx)), group.nbytes)
        out.append(sharing.route((sink_idx,)))
    return out
