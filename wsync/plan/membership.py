"""What a plan becomes when engine replicas are lost or join, without routing anew.

Everything that does not depend on how many ranks a class of engine ranks has stays as it is: classes, units, flows and
the numbers of their buckets. Only trees change. Where that cannot be, there is no patch, and all is routed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from wsync.plan.classes import TensorClass
from wsync.plan.flows import LOCAL, Flow, Tree
from wsync.plan.nodes import Nodes
from wsync.plan.patch import patched_trees
from wsync.plan.rank_classes import Sinks
from wsync.plan.types import SOURCE


@dataclass(frozen=True, slots=True)
class Routed:
    """Trees and flows, and the engine ranks that they are for.

    Attributes:
        sinks: of the plan.
        trees, flows: of the plan.
        score: that the last full routing reached.
    """

    sinks: Sinks
    trees: tuple[Tree, ...]
    flows: tuple[Flow, ...]
    score: float


def patch(
    before: Routed, sinks: Sinks, classes: Sequence[TensorClass], nodes: Nodes, relay: bool
) -> tuple[tuple[Tree, ...], tuple[Flow, ...]] | None:
    """Trees and flows for ``sinks``, made of those of a plan for the same classes of engine ranks; None if that fails.

    Args:
        before: the plan before.
        sinks: who is there now.
        classes: of tensors.
        nodes: of the job now.
        relay: whether engine ranks may pass on to other nodes.
    """
    if any(lane.port < 0 for lane in nodes.sinks):
        return None
    kept = _kept(before.sinks, sinks)
    new = sorted(set(range(len(sinks.numbers))) - set(kept.values()))
    joining = _joining(before, new, kept, sinks, classes, nodes)
    if joining is None:
        return None
    trees = patched_trees(before.trees, before.flows, kept, joining, nodes, relay)
    return _without_empty(trees, before.flows)


def _kept(before: Sinks, sinks: Sinks) -> dict[int, int]:
    """Old index -> new index of the ranks that are still what and where they were."""
    now = {key: i for i, key in enumerate(_keys(sinks))}
    return {i: now[key] for i, key in enumerate(_keys(before)) if key in now}


def _keys(sinks: Sinks) -> list[tuple[str, int, int, str]]:
    ranks = zip(sinks.manifest.ranks, sinks.numbers, strict=True)
    return [(rank.replica, rank.rank, number, rank.info.host) for rank, number in ranks]


def _joining(
    before: Routed,
    new: Sequence[int],
    kept: Mapping[int, int],
    sinks: Sinks,
    classes: Sequence[TensorClass],
    nodes: Nodes,
) -> list[list[int]] | None:
    """For each tree the new sinks that need all that travels along it; None if some byte has no one tree for a sink."""
    out: list[list[int]] = [[] for _ in before.trees]
    if not new:
        return out
    holding = {nodes.island[node] for node in nodes.source_node}
    if any(nodes.island[nodes.sink_node[s]] in holding for s in new):
        return None  # what its own island holds must not come from elsewhere
    zones = [_zones(tree, kept, nodes) for tree in before.trees]
    loads = _Loads(before.flows, classes, len(before.trees))
    for sink in new:
        zone = nodes.zone[nodes.sink_node[sink]]
        taken = loads.taken(sinks.numbers[sink], np.array([zone in z for z in zones], dtype=np.bool_))
        if taken is None:
            return None
        for tree_idx in np.flatnonzero(taken).tolist():
            out[tree_idx].append(sink)
    return out


def _zones(tree: Tree, kept: Mapping[int, int], nodes: Nodes) -> set[int]:
    """Where ranks are left on a tree that comes from other islands."""
    if any(src == SOURCE and rail == LOCAL for (src, _), rail in zip(tree.hops, tree.rails, strict=True)):
        return set()
    return {nodes.zone[nodes.sink_node[kept[s]]] for s in tree.sinks if s in kept}


class _Loads:
    """What travels along each tree, unit by unit."""

    def __init__(self, flows: Sequence[Flow], classes: Sequence[TensorClass], num_trees: int) -> None:
        first = np.cumsum([0, *(len(c.blocks.units) for c in classes)]).tolist()
        rows = [(f.tree_idx, first[e.class_idx] + e.unit_idx, e.end - e.first) for f in flows for e in f.entries]
        self._tree, self._unit, self._count = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        self._members = np.array([len(c.members) for c in classes for _ in c.blocks.units], dtype=np.int64)
        masks: dict[int, int] = {}
        self._mask_of = np.array(
            [masks.setdefault(c.needers(u), len(masks)) for c in classes for u in c.blocks.units], dtype=np.int64
        )
        self._masks = list(masks)
        self._num_trees = num_trees

    def taken(self, number: int, reached: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
        """Of the trees that could be led to a rank those that it needs.

        None unless it needs all that travels along each, and gets all that it needs exactly once.

        Args:
            number: class of the rank.
            reached: ``bool [num_trees]``.
        """
        needs = np.array([mask >> number & 1 for mask in self._masks], dtype=np.bool_)[self._mask_of]
        wanted = np.bincount(self._tree, needs[self._unit], self._num_trees).astype(np.int64)
        entries = np.bincount(self._tree, minlength=self._num_trees)
        taken: npt.NDArray[np.bool_] = reached & (wanted > 0)
        if (wanted[taken] != entries[taken]).any():
            return None
        got = np.bincount(self._unit, self._count * taken[self._tree], len(self._members)).astype(np.int64)
        return taken if (got[needs] == self._members[needs]).all() else None


def _without_empty(trees: Sequence[Tree | None], flows: Sequence[Flow]) -> tuple[tuple[Tree, ...], tuple[Flow, ...]]:
    """Without the trees on which nobody is left, and their flows; numbers of buckets stay."""
    index = {old: new for new, old in enumerate(i for i, tree in enumerate(trees) if tree is not None)}
    left = tuple(tree for tree in trees if tree is not None)
    if len(left) == len(trees):
        return left, tuple(flows)
    return left, tuple(msgspec.structs.replace(f, tree_idx=index[f.tree_idx]) for f in flows if f.tree_idx in index)
