"""Routing: groups in, routes and trees out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wsync.plan.flows import DemandGroup, Flow, Route, Routing, Share
from wsync.plan.nodes import Nodes
from wsync.plan.route.assign import Run, assign, take
from wsync.plan.route.plots import MIN_PART_BUCKETS
from wsync.plan.route.relays import GAIN, Fans
from wsync.plan.route.stripes import Stripes
from wsync.plan.route.survey import Mode, Survey
from wsync.plan.route.trees import TreeBook
from wsync.plan.route.weave import Weave, least_of_zones
from wsync.plan.timing import plan_times
from wsync.plan.types import PlanOptions

ENOUGH = 0.995
"""Bytes cross shared links otherwise than from the nearest holder only if that makes a plan this much faster."""
WOVEN = (Mode.EACH, Mode.SIDES, Mode.APART, Mode.TOGETHER)
"""How zones are served where shared links separate them, if it is not only from the nearest holder."""


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
    surveys = [(survey, Fans(survey.bundles, nodes, options.relay))]
    if nodes.zones.count > 1:
        surveys += _woven(groups, surveys[0], options)
    best_s = min(fans.worst for _, fans in surveys) / ENOUGH
    good = [x for x in surveys if x[1].worst <= best_s]
    found = [_Router(nodes, survey, fans, bucket_bytes).routing(len(groups)) for survey, fans in good]
    if len(found) == 1:
        return found[0]
    seconds = [_seconds(routing, nodes, bucket_bytes) for routing in found]
    # The first of those that are equally good is the simplest.
    return next(r for r, s in zip(found, seconds, strict=True) if s * ENOUGH <= min(seconds))


def _woven(
    groups: Sequence[DemandGroup], nearest: tuple[Survey, Fans], options: PlanOptions
) -> Iterator[tuple[Survey, Fans]]:
    """Other ways to serve zones, until one is as fast as any could be."""
    nodes, best, least = nearest[0].nodes, nearest[1].worst, least_of_zones(*nearest)
    for mode in WOVEN:
        if best <= least + least // GAIN:
            return
        survey = Survey(nodes, mode)
        survey.add(groups)
        fans = Weave(survey.bundles, nodes, options.relay, best, least)
        best = min(best, fans.worst)
        yield survey, fans


def _seconds(routing: Routing, nodes: Nodes, bucket_bytes: int) -> float:
    total: dict[tuple[int, int], int] = {}
    for routes in routing.routes:
        for found in routes:
            for rank, tree, nbytes in found.shares:
                total[(rank, tree)] = total.get((rank, tree), 0) + nbytes
    flows = [Flow(0, rank, 0, tree, (), n) for (rank, tree), n in total.items()]
    return plan_times(routing.trees, flows, nodes, bucket_bytes).time_s


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

    def routing(self, num_groups: int) -> Routing:
        runs = assign(self.legs, self.bundles, self.fans, self.nodes, self.bucket_bytes)
        remote = [r for r in runs if not self.bundles[r.bundle_idx].family.local]
        stripes = Stripes(self.nodes, self.bundles, self.fans, self.book, self.bucket_bytes).choose(remote)
        way_of = {id(run): found for run, found in zip(remote, stripes, strict=True)}
        shares: list[list[Share]] = [[] for _ in self.legs]
        for run in runs:
            trees = way_of.get(id(run))
            if trees is None:
                for part in self._by_domain(run):
                    self._hand_out(part, self._local(part), shares)
            else:
                run.loads.sort(key=lambda x: (self.nodes.sources[x.rank].own, x.leg_idx))
                self._hand_out(run, trees, shares)
        routes: list[list[Route]] = [[] for _ in range(num_groups)]
        for leg, mine in zip(self.legs, shares, strict=True):
            found = routes[leg.group_idx]
            if found and found[-1].sinks is leg.family.sinks:
                mine = [*found.pop().shares, *mine]
            found.append(Route(leg.family.sinks, tuple(_merged(mine))))
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

    def _by_domain(self, run: Run) -> Iterator[Run]:
        """The loads of a run inside an island, by the NVLink domain that they come from."""
        parts: dict[int, Run] = {}
        for load in run.loads:
            domain = self.nodes.sources[load.rank].domain
            part = parts.setdefault(domain, Run(run.bundle_idx, run.port))
            part.loads.append(load)
            part.nbytes += load.nbytes
        yield from parts.values()

    def _local(self, run: Run) -> list[tuple[int, int]]:
        """Heads take turns, those of the senders' NVLink domain if there are any; only what is worth it is cut."""
        family = self.bundles[run.bundle_idx].family
        members = family.members[0]
        home = self.nodes.sources[run.loads[0].rank].domain
        heads = [s for s in members if self.nodes.sinks[s].domain == home] or members
        count = max(1, min(len(heads), run.nbytes // (MIN_PART_BUCKETS * self.bucket_bytes)))
        ends = [run.nbytes * (i + 1) // count for i in range(count)]
        out = []
        for nbytes in (b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)):
            head = min(heads, key=lambda s: (self.carried[s], s))
            self.carried[head] += nbytes * len(members)
            out.append((self.book.local(family, head), nbytes))
        return out


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
