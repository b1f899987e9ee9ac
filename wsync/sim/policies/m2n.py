"""NCCL M2N (first published as NCCL Xfer): trainer copies take ranges of engine copies, a ring over domains in each.

Source: the repository ``NVIDIA/nccl-extensions``, README of ``nccl_m2n`` ("Tuning": RING is a hierarchical ring with a
fan-out inside NVLink domains; UNIFORM splits by the number of ranks, NODE_AWARE lets each domain be served as one) and
``reshard_loadbalance.cc``, which says which copies of the source serve which of the destination.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wsync.plan.flows import DemandGroup, Route, Routing
from wsync.plan.nodes import Nodes
from wsync.sim.policies.moves import Moves, Sharing, TreeBook
from wsync.sim.policies.trees import TreeMaker


def m2n_uniform(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """Copies are split evenly, whatever node they are on; surplus copies of the trainer stay idle."""
    maker, book = TreeMaker(nodes), TreeBook()
    routes = []
    for group in groups:
        ranges = _ranges(len(group.holders), [[s] for s in group.sinks])
        routes.append(tuple(_rings(group, ranges, maker, book)))
    return Moves(Routing(book.trees, routes))


def m2n_node_aware(groups: Sequence[DemandGroup], nodes: Nodes) -> Moves:
    """Domains are split evenly: all copies of a domain come from one of the trainer's."""
    maker, book = TreeMaker(nodes), TreeBook()
    routes = []
    for group in groups:
        ranges = _ranges(len(group.holders), maker.islands(group.sinks), spread=False)
        routes.append(tuple(_rings(group, ranges, maker, book)))
    return Moves(Routing(book.trees, routes))


def _ranges(num_holders: int, items: list[list[int]], spread: bool = True) -> Iterator[tuple[int, list[int]]]:
    """Which holder (by position) serves which sinks.

    With fewer items than holders, UNIFORM takes the first holder of each even part, NODE_AWARE the first holders.
    """
    if len(items) >= num_holders:
        bounds = _even(len(items), num_holders)
        for holder in range(num_holders):
            yield holder, [s for item in items[bounds[holder] : bounds[holder + 1]] for s in item]
        return
    bounds = _even(num_holders, len(items)) if spread else list(range(len(items) + 1))
    for i, item in enumerate(items):
        yield bounds[i], item


def _even(num_items: int, num_parts: int) -> list[int]:
    """Where even parts begin, the first ones larger by one where they do not divide; and the end."""
    size, larger = divmod(num_items, num_parts)
    return [i * size + min(i, larger) for i in range(num_parts + 1)]


def _rings(
    group: DemandGroup, ranges: Iterator[tuple[int, list[int]]], maker: TreeMaker, book: TreeBook
) -> Iterator[Route]:
    for holder, sinks in ranges:
        sharing = Sharing()
        src_rank = group.holders[holder]
        sharing.add(src_rank, book.add(maker.chain(src_rank, sinks)), group.nbytes)
        yield sharing.route(tuple(sorted(sinks)))
