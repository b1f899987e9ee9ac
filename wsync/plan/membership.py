"""What a plan becomes when engine replicas are lost or join, without routing anew.

Everything that does not depend on how many ranks a class of engine ranks has stays as it is: classes, units, flows and
the numbers of their buckets. Only trees change. Where that cannot be, there is no patch, and all is routed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from wsync.plan.flows import Flow, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.rank_classes import Sinks
from wsync.plan.route.patch import with_sinks, without_sinks
from wsync.plan.types import SOURCE


@dataclass(frozen=True, slots=True)
class Routed:
    """Trees and flows, and the engine ranks that they are for.

    Attributes:
        sinks: of the plan.
        nodes: of the job then.
        trees, flows: of the plan.
        score: that the last full routing reached.
        num_sinks: of that routing.
    """

    sinks: Sinks
    nodes: Nodes
    trees: tuple[Tree, ...]
    flows: tuple[Flow, ...]
    score: float
    num_sinks: int


def patch(
    before: Routed, sinks: Sinks, nodes: Nodes, *, relay: bool
) -> tuple[tuple[Tree, ...], tuple[Flow, ...]] | None:
    """Trees and flows for ``sinks``, made of those of a plan for the same classes of engine ranks.

    Args:
        before: the plan before.
        sinks: who is there now.
        nodes: of the job now.
        relay: whether engine ranks may pass on to other nodes.

    Returns:
        None where a new rank has no twin (one that needs the same, and needs it from as far), or where scales could
        be left without the weights whose packing makes them.
    """
    kept = _kept(before.sinks, sinks)
    like = _twins(sinks, nodes, set(kept.values()))
    if like is None or any(lane.port < 0 for lane in (*nodes.sinks, *before.nodes.sinks)):
        return None
    nbytes = [0] * len(before.trees)
    for flow in before.flows:
        nbytes[flow.tree_idx] += flow.wire_bytes
    lost = [i for i in range(len(before.sinks.numbers)) if i not in kept]
    left = without_sinks(before.trees, nbytes, before.nodes, lost, relay=relay)
    if _orphans(before.flows, left):
        return None
    names = {SOURCE: SOURCE, **dict(enumerate(kept[i] for i in sorted(kept)))}
    index = {old: new for new, old in enumerate(i for i, tree in enumerate(left) if tree is not None)}
    trees = [_renamed(tree, names) for tree in left if tree is not None]
    trees = with_sinks(trees, [nbytes[i] for i in index], nodes, like, relay=relay)
    return tuple(trees), _flows(before.flows, index, len(left))


def _kept(before: Sinks, sinks: Sinks) -> dict[int, int]:
    """Old index -> new index of the ranks that are still what and where they were."""
    now = {key: i for i, key in enumerate(_keys(sinks))}
    return {i: now[key] for i, key in enumerate(_keys(before)) if key in now}


def _keys(sinks: Sinks) -> list[tuple[str, int, int, str, int | None]]:
    ranks = zip(sinks.manifest.ranks, sinks.numbers, strict=True)
    return [(rank.replica, rank.rank, number, rank.info.host, rank.info.gpu) for rank, number in ranks]


def _twins(sinks: Sinks, nodes: Nodes, kept: set[int]) -> dict[int, int] | None:
    """For each new rank a kept one of its class and zone; None if one has none.

    A twin gets everything exactly once, so whoever is on the same trees does so too. Neither may be on an island of
    trainer ranks: what its own island holds must not come from elsewhere.
    """
    holding = {nodes.island[node] for node in nodes.source_node}
    away = [nodes.island[node] not in holding for node in nodes.sink_node]
    keys = [(number, nodes.zone[node]) for number, node in zip(sinks.numbers, nodes.sink_node, strict=True)]
    twins = {keys[i]: i for i in sorted(kept, reverse=True) if away[i]}
    new = [i for i in range(len(keys)) if i not in kept]
    if not all(away[i] and keys[i] in twins for i in new):
        return None
    return {i: twins[keys[i]] for i in new}


def _orphans(flows: Sequence[Flow], left: Sequence[Tree | None]) -> bool:
    """Whether scales may be left that a rank sends and no longer makes, since nobody takes the weights from it."""
    gone = {(f.src_rank, e.class_idx) for f in flows if f.stage == 0 and left[f.tree_idx] is None for e in f.entries}
    if not gone:
        return False
    scales = (f for f in flows if f.stage and left[f.tree_idx] is not None)
    return any((f.src_rank, e.class_idx) in gone for f in scales for e in f.entries)


def _renamed(tree: Tree, names: Mapping[int, int]) -> Tree:
    hops = tuple((names[src], names[dst]) for src, dst in tree.hops)
    return Tree(tuple(sorted(names[s] for s in tree.sinks)), hops, tree.rails)


def _flows(flows: Sequence[Flow], index: Mapping[int, int], num_before: int) -> tuple[Flow, ...]:
    """The flows of the trees that are left, by their index before; numbers of buckets stay."""
    if len(index) == num_before:
        return tuple(flows)
    return tuple(msgspec.structs.replace(f, tree_idx=index[f.tree_idx]) for f in flows if f.tree_idx in index)
