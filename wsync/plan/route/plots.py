"""The bytes of a family cut where its trees change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wsync.plan.nodes import ATTOSECONDS, Nodes
from wsync.plan.route.assign import Run
from wsync.plan.route.relays import GRAIN, Fan, Fans, ZoneTree
from wsync.plan.route.shapes import GOLDEN, best_width, find_parts, sampled, tree_of
from wsync.plan.route.survey import Bundle, Family
from wsync.plan.route.weave import woven_tree

MIN_PART_BUCKETS = 2
"""Trees are not changed for less than this many buckets."""
MINOR_FILL = 0.004
"""Chains that fill in this part of the busiest port's time are not made shallower."""

Edges = tuple[tuple[int, int], ...]
"""Hops between islands, by their position in the family; -1 is the sender."""


class Plot(NamedTuple):
    """Some bytes of a run, and the hops between islands that they take."""

    edges: Edges
    nbytes: int


class Plots:
    """Goes through the bytes of every family, run by run.

    Args:
        bundles: of all legs.
        fans: of the bundles.
        nodes: of the job.
        bucket_bytes: size of a bucket.
    """

    def __init__(self, bundles: Sequence[Bundle], fans: Fans, nodes: Nodes, bucket_bytes: int) -> None:
        self.bundles = bundles
        self.fans = fans
        self.nodes = nodes
        self.bucket_bytes = bucket_bytes
        self._total: dict[tuple[int, Fan], int] = {}
        for bundle, fan in zip(bundles, fans.of, strict=True):
            key = (bundle.family.number, fan)
            self._total[key] = self._total.get(key, 0) + bundle.nbytes
        self._position: dict[tuple[int, Fan], int] = {}
        self._parts: dict[tuple[int, Fan], list[tuple[float, Edges]]] = {}

    def cut(self, run: Run) -> list[Plot]:
        """The next bytes of a run's family."""
        family, fan = self.bundles[run.bundle_idx].family, self.fans.of[run.bundle_idx]
        woven = self.fans.woven.get((run.bundle_idx, run.port))
        if woven is not None:
            return self._between(self._woven_parts(family, woven), 0, run.nbytes, run.nbytes)
        key = (family.number, fan)
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = self._find_parts(family, fan)
        if len(parts) == 1:
            return [Plot(parts[0][1], run.nbytes)]
        # With an uneven number of copies of the sender, every sender has to go through all parts.
        whole = fan.source % GRAIN == 0
        total = self._total[key] if whole else run.nbytes
        start = self._position.get(key, 0) if whole else 0
        self._position[key] = start + run.nbytes
        return self._between(parts, start, start + run.nbytes, total)

    def _between(self, parts: Sequence[tuple[float, Edges]], start: int, end: int, total: int) -> list[Plot]:
        nbytes: dict[Edges, int] = {}
        at = start
        edges = [round(limit * total) for limit, _ in parts]
        while at < end:
            lap, place = divmod(at, total)
            idx = next(i for i, edge in enumerate(edges) if place < edge)
            step = min(end, lap * total + edges[idx]) - at
            # Less than a bucket is not worth a tree of its own.
            if end - at - step < self.bucket_bytes:
                step = end - at
            nbytes[parts[idx][1]] = nbytes.get(parts[idx][1], 0) + step
            at += step
        return [Plot(hops, n) for hops, n in nbytes.items()]

    def _woven_parts(self, family: Family, woven: Sequence[tuple[ZoneTree, int]]) -> list[tuple[float, Edges]]:
        """Trees of zones, those in which islands take turns cut so that each is the last about equally often."""
        total = sum(nbytes for _, nbytes in woven)
        most = max(family.zones.count(zone) for zone in set(family.zones))
        parts: list[tuple[float, Edges]] = []
        at = 0
        for tree, nbytes in woven:
            count = max(1, min(most, nbytes // (MIN_PART_BUCKETS * self.bucket_bytes))) if tree.turn < 0 else 1
            for i in range(count):
                turn = i * most // count if tree.turn < 0 else tree.turn
                edges = woven_tree(family, tree._replace(turn=turn))
                parts.append(((at + nbytes * (i + 1) // count) / total, edges))
            at += nbytes
        return parts

    def _find_parts(self, family: Family, fan: Fan) -> list[tuple[float, Edges]]:
        count = len(family.islands)
        relays = [x / GRAIN for x in fan.relays] or [0.0] * count
        parts = find_parts(fan.source / GRAIN, relays, self._width(family, fan.source // GRAIN))
        limit = max(1, self._total[(family.number, fan)] // (MIN_PART_BUCKETS * self.bucket_bytes))
        parts = sampled(parts, limit, family.number * GOLDEN)
        return [(part.end, tuple(tree_of(part, i))) for i, part in enumerate(parts)]

    def _width(self, family: Family, source: int) -> int:
        lanes = [self.nodes.sinks[m[0]] for m in family.members]
        rate = min((self.nodes.nics[i].rate_gbps for lane in lanes for i in lane.reach), default=1.0)
        bucket_s = min(self.bucket_bytes, family.nbytes) / (rate * 1e9)
        enough_s = self.fans.worst / ATTOSECONDS * MINOR_FILL
        return best_width(len(lanes), source, self.nodes.cluster.alpha_s, bucket_s, enough_s)
