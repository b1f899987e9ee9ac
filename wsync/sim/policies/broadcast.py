"""Broadcasts: every engine rank receives every tensor as a whole and keeps what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from wsync.plan.flows import DemandGroup, Route, Routing
from wsync.plan.nodes import Nodes
from wsync.sim.policies.moves import Gathers, Moves, Sharing, TreeBook
from wsync.sim.policies.trees import TreeMaker


def rank0_broadcast(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """Trainer rank 0 gathers every tensor and broadcasts it to all engine ranks, from node to node.

    Only rank 0's share of the gathering is counted; FSDP's and ZeRO-3's give every trainer rank a copy.

    Source: TRL's vLLM client and OpenRLHF (``GatheredParameters``, then a broadcast in a group of rank 0 and all vLLM
    workers); vLLM's documentation of weight transfer: a broadcast costs every worker the total bytes.
    """
    return _broadcast(groups, nodes, lambda _: 0)


def stage_broadcast(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """The first rank of every pipeline stage gathers that stage's tensors and sends them whole to all engine ranks.

    Trainer ranks that hold pieces of one tensor belong to its stage.

    Source: slime, ``UpdateWeightFromDistributed`` in ``slime/backends/megatron_utils``: a group for each pipeline rank,
    in which only the rank of data and tensor parallel index 0 broadcasts, after gathering tensor and expert parallel
    shards.
    """
    first: dict[int, int] = {}
    for group in groups:
        for lot in group.lots:
            first[lot.class_idx] = min(first.get(lot.class_idx, group.holders[0]), group.holders[0])
    return _broadcast(groups, nodes, first.__getitem__)


def _broadcast(groups: Sequence[DemandGroup], nodes: Nodes, sender_of: Callable[[int], int]) -> Moves:
    """``sender_of`` names the trainer rank that sends the tensors of a class.

    Every sender has a ring of its own, which enters nodes by a GPU of its own.
    """
    maker, book, gathers = TreeMaker(nodes), TreeBook(), Gathers()
    every = range(len(nodes.sink_node))
    trees: dict[int, int] = {}
    routes: list[tuple[Route, ...]] = []
    for group in groups:
        sharing = Sharing()
        for lot in group.lots:
            sender = sender_of(lot.class_idx)
            gathers.add(group.holders, sender, lot.nbytes * lot.num_members)
            if sender not in trees:
                heads = maker.islands(every)[0]
                trees[sender] = book.add(maker.chain(sender, every, head=heads[len(trees) % len(heads)]))
            sharing.add(sender, trees[sender], lot.nbytes * lot.num_members)
        routes.append((sharing.route(group.sinks),))
    return Moves(Routing(book.trees, routes), gathers.all())


def checkpoint_engine(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """The checkpoint is spread over the engine ranks' host memory; each copies its part to its GPU and broadcasts it.

    Getting there from the trainer is one send of every byte, from its owners in turn.

    Source: MoonshotAI checkpoint-engine 0.4.2, README "Optimized Weight Broadcast" (H2D, broadcast among all workers,
    reload) and ``ParameterServer._update_per_bucket`` without ranks.
    """
    maker, book = TreeMaker(nodes), TreeBook()
    every = range(len(nodes.sink_node))
    trees: dict[tuple[int, int], int] = {}
    host_bytes = dict.fromkeys(every, 0)
    routes: list[tuple[Route, ...]] = []
    parts = _Parts(sum(g.nbytes for g in groups), len(every))
    for i, group in enumerate(groups):
        sharing = Sharing()
        for owner, nbytes in parts.take(group.nbytes):
            way = (group.holders[i % len(group.holders)], owner)
            if way not in trees:
                trees[way] = book.add(maker.chain(way[0], every, head=owner))
            sharing.add(way[0], trees[way], nbytes)
            host_bytes[owner] += nbytes
        routes.append((sharing.route(group.sinks),))
    return Moves(Routing(book.trees, routes), host_bytes=host_bytes)


class _Parts:
    """All bytes in order, cut into equal parts."""

    def __init__(self, nbytes: int, num_parts: int) -> None:
        self._size = -(-nbytes // num_parts)
        self._at = 0

    def take(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """The next ``nbytes``, by part."""
        while nbytes:
            part, before = divmod(self._at, self._size)
            num = min(nbytes, self._size - before)
            yield part, num
            self._at += num
            nbytes -= num
