"""Routing: groups in, routes and trees out."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.flows import DemandGroup, Route, Routing, Share
from wsync.plan.nodes import ATTOSECONDS, Nodes
from wsync.plan.route.assign import Run, assign, take
from wsync.plan.route.relays import GRAIN, Fan, Fans
from wsync.plan.route.shapes import GOLDEN, Part, best_width, find_parts, sampled, tree_of
from wsync.plan.route.stripes import Stripes
from wsync.plan.route.survey import Family, Survey
from wsync.plan.route.trees import TreeBook
from wsync.plan.types import PlanOptions

MIN_PART_BUCKETS = 2
"""Trees are not changed for less than this many buckets."""
MINOR_FILL = 0.004
"""Chains that fill in this part of the busiest port's time are not made shallower."""

Stretch = list[tuple[int, list[tuple[int, int]]]]


def route(groups: Sequence[DemandGroup], nodes: Nodes, bucket_bytes: int, options: PlanOptions) -> Routing:
    """Decide who sends the bytes of every group, and along which trees they reach all who need them.

    Deterministic. Trees and shares are whole numbers of bytes; shares of one group are cut at multiples of
    ``bucket_bytes``.

    Args:
        groups: what has to be carried.
        nodes: of the job.
        bucket_bytes: size of a bucket.
        options: ``relay`` allows engine ranks to pass on to other nodes what they need themselves.

    Raises:
        ConfigError: no path leads from any holder of a group to one of its needers; both nodes are named.
    """
    survey = Survey(nodes)
    survey.add(groups)
    fans = Fans(survey.bundles, nodes, options.relay)
    if options.relay and nodes.zones.count > 1:
        joined = Survey(nodes, joined=True)
        joined.add(groups)
        other = Fans(joined.bundles, nodes, options.relay)
        if other.worst < fans.worst * 0.995:
            survey, fans = joined, other
    return _Router(nodes, survey, fans, bucket_bytes).routing(len(groups))


class _Router:
    """Chooses heads, rails and trees for every run."""

    def __init__(self, nodes: Nodes, survey: Survey, fans: Fans, bucket_bytes: int) -> None:
        self.nodes = nodes
        self.legs = survey.legs
        self.bundles = survey.bundles
        self.fans = fans
        self.bucket_bytes = bucket_bytes
        self.book = TreeBook(nodes)
        self.carried = [0] * len(nodes.sinks)
        self._total: dict[tuple[int, Fan], int] = {}
        for bundle, fan in zip(self.bundles, fans.of, strict=True):
            key = (bundle.family.number, fan)
            self._total[key] = self._total.get(key, 0) + bundle.nbytes
        self._position: dict[tuple[int, Fan], int] = {}
        self._parts: dict[tuple[int, Fan], list[tuple[Part, tuple[tuple[int, int], ...]]]] = {}

    def routing(self, num_groups: int) -> Routing:
        runs = assign(self.legs, self.bundles, self.fans, self.nodes, self.bucket_bytes)
        remote = [r for r in runs if not self.bundles[r.bundle_idx].family.local]
        stripes = Stripes(self.nodes, self.bundles, self.fans, self.book, self.bucket_bytes).choose(remote)
        way_of = {id(run): found for run, found in zip(remote, stripes, strict=True)}
        shares: list[list[Share]] = [[] for _ in self.legs]
        for run in runs:
            found = way_of.get(id(run))
            if found is None:
                self._hand_out(run, self._local(run), shares)
            else:
                run.loads.sort(key=lambda x: (self.nodes.sources[x.rank].own, x.leg_idx))
                self._hand_out(run, self._remote(run, found), shares)
        routes: list[list[Route]] = [[] for _ in range(num_groups)]
        for leg, mine in zip(self.legs, shares, strict=True):
            routes[leg.group_idx].append(Route(leg.family.sinks, tuple(_merged(mine))))
        return _without_unused(Routing(self.book.trees, [tuple(r) for r in routes]))

    def _hand_out(self, run: Run, trees: list[tuple[int, int]], shares: list[list[Share]]) -> None:
        """Lead the loads of a run along (tree, bytes) in order."""
        if len(trees) == 1:
            for leg_idx, rank, nbytes in run.loads:
                shares[leg_idx].append(Share(rank, trees[0][0], nbytes))
            return
        queue = [[tree, nbytes] for tree, nbytes in reversed(trees)]
        for leg_idx, rank, nbytes in run.loads:
            shares[leg_idx] += [Share(rank, tree, n) for tree, n in take(queue, nbytes, self.bucket_bytes)]

    def _local(self, run: Run) -> list[tuple[int, int]]:
        """Heads take turns; only what is worth it is cut."""
        family = self.bundles[run.bundle_idx].family
        members = family.members[0]
        count = max(1, min(len(members), run.nbytes // (MIN_PART_BUCKETS * self.bucket_bytes)))
        ends = [run.nbytes * (i + 1) // count for i in range(count)]
        out = []
        for nbytes in (b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)):
            head = min(members, key=lambda s: (self.carried[s], s))
            self.carried[head] += nbytes * len(members)
            out.append((self.book.local(family, head), nbytes))
        return out

    def _remote(self, run: Run, stripes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Cut stripes where the family's trees change."""
        family, fan = self.bundles[run.bundle_idx].family, self.fans.of[run.bundle_idx]
        key = (family.number, fan)
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = self._find_parts(family, fan)
        if len(parts) == 1:
            return [(self.book.remote(family, parts[0][1], way), nbytes) for way, nbytes in stripes]
        # With an uneven number of copies of the sender, every sender has to go through all parts.
        whole = fan.source % GRAIN == 0
        total = self._total[key] if whole else run.nbytes
        at = self._position.get(key, 0) if whole else 0
        out = []
        for way, nbytes in stripes:
            end = at + nbytes
            while at < end:
                place = at % total
                part, edges = next(x for x in parts if place < x[0].end * total - 0.5 or x is parts[-1])
                step = max(1, min(end - at, round(part.end * total) - place))
                out.append((self.book.remote(family, edges, way), step))
                at += step
        self._position[key] = at
        return out

    def _find_parts(self, family: Family, fan: Fan) -> list[tuple[Part, tuple[tuple[int, int], ...]]]:
        count = len(family.islands)
        relays = fan.relays or (0,) * count
        width = self._width(family, fan.source // GRAIN)
        parts = find_parts(fan.source / GRAIN, [r / GRAIN for r in relays], width)
        limit = max(1, self._total[(family.number, fan)] // (MIN_PART_BUCKETS * self.bucket_bytes))
        parts = sampled(parts, limit, family.number * GOLDEN)
        return [(part, tuple(tree_of(part, i, family.zones))) for i, part in enumerate(parts)]

    def _width(self, family: Family, source: int) -> int:
        if len(set(family.zones)) > 1:
            return 1
        lanes = [self.nodes.sinks[m[0]] for m in family.members]
        rate = min((self.nodes.nics[i].rate_gbps for lane in lanes for i in lane.reach), default=1.0)
        bucket_s = min(self.bucket_bytes, family.nbytes) / (rate * 1e9)
        enough_s = self.fans.worst / ATTOSECONDS * MINOR_FILL
        return best_width(len(lanes), source, self.nodes.cluster.alpha_s, bucket_s, enough_s)


def _merged(shares: Sequence[Share]) -> Sequence[Share]:
    """Shares of one sender along one tree are one."""
    if len(shares) == 1:
        return shares
    total: dict[tuple[int, int], int] = {}
    for share in shares:
        key = (share.src_rank, share.tree_idx)
        total[key] = total.get(key, 0) + share.nbytes
    return [Share(rank, tree, n) for (rank, tree), n in total.items()]


def _without_unused(routing: Routing) -> Routing:
    """Trees that rounding left without bytes are dropped."""
    used = sorted({share.tree_idx for routes in routing.routes for r in routes for share in r.shares})
    if len(used) == len(routing.trees):
        return routing
    index = {old: new for new, old in enumerate(used)}
    routes = [
        tuple(Route(r.sinks, tuple(Share(s.src_rank, index[s.tree_idx], s.nbytes) for s in r.shares)) for r in found)
        for found in routing.routes
    ]
    return Routing([routing.trees[i] for i in used], routes)
