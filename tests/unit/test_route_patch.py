"""Trees after sinks left or joined."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from route_cases import (
    MIB,
    check_routing,
    cluster_of,
    cpu_group,
    flows_of,
    gpu_group,
    group,
    hosts,
    plan,
    random_case,
    replicated,
)

from wsync.plan.flows import DemandGroup, Route, Routing, Share
from wsync.plan.nodes import nodes_of
from wsync.plan.route import route
from wsync.plan.route.patch import with_sinks, without_sinks
from wsync.plan.timing import plan_times
from wsync.plan.types import SOURCE, PlanOptions

GB = 10**9


def bytes_of(routing):
    total = Counter()
    for routes in routing.routes:
        for found in routes:
            for share in found.shares:
                total[share.tree_idx] += share.nbytes
    return [total[i] for i in range(len(routing.trees))]


def rewritten(routing, trees, sinks_of):
    """The routing with other trees; equal ones are one, as `check_routing` wants."""
    index, kept = {}, []
    for tree in trees:
        if tree is not None and tree not in index:
            index[tree] = len(kept)
            kept.append(tree)
    routes = []
    for old in routing.routes:
        new = []
        for found in old:
            sinks = sinks_of(found.sinks)
            total = Counter()
            for share in found.shares:
                if sinks:
                    total[(share.src_rank, index[trees[share.tree_idx]])] += share.nbytes
            if sinks:
                new.append(Route(sinks, tuple(Share(r, t, n) for (r, t), n in total.items())))
        routes.append(tuple(new))
    return Routing(kept, routes)


def leave(groups, sources, sinks, cluster, lost, relay=True, bucket=MIB):
    """(new groups, new nodes, patched routing)."""
    nodes, routing, *_ = plan(groups, sources, sinks, cluster, bucket, relay)
    trees = without_sinks(routing.trees, bytes_of(routing), nodes, lost, relay=relay)
    stay = [s for s in range(len(sinks)) if s not in lost]
    number = {s: i for i, s in enumerate(stay)}

    def renumber(old):
        return tuple(number[s] for s in old if s in number)

    left = [DemandGroup(g.holders, renumber(g.sinks), g.stage, g.lots, g.nbytes) for g in groups]
    return left, nodes_of(sources, [sinks[s] for s in stay], cluster), rewritten(routing, trees, renumber)


def busiest_s(routing, nodes):
    return plan_times(routing.trees, flows_of(routing), nodes, MIB).busiest_s


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5000), st.data(), st.booleans())
def test_all_who_stay_are_still_reached_once(seed, data, relay):
    groups, sources, sinks, cluster = random_case(seed)
    lost = data.draw(st.sets(st.integers(0, len(sinks) - 1), min_size=1))
    left, nodes, routing = leave(groups, sources, sinks, cluster, lost, relay)
    kept = [(g, r) for g, r in zip(left, routing.routes, strict=True) if g.sinks]
    check_routing([g for g, _ in kept], Routing(routing.trees, [r for _, r in kept]), nodes, relay)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5000), st.data(), st.booleans())
def test_all_who_join_are_reached_once(seed, data, relay):
    groups, sources, sinks, cluster = random_case(seed)
    _, routing, *_ = plan(groups, sources, sinks, cluster, MIB, relay)
    old = data.draw(st.lists(st.integers(0, len(sinks) - 1), min_size=1, max_size=4))
    able = sorted(set(sinks) - set(sources))
    assume(able)
    places = data.draw(st.lists(st.sampled_from(able), min_size=len(old), max_size=len(old)))
    like = {len(sinks) + i: s for i, s in enumerate(old)}
    nodes = nodes_of(sources, [*sinks, *places], cluster)

    def more(known):
        return tuple(sorted([*known, *(new for new, s in like.items() if s in known)]))

    trees = with_sinks(routing.trees, bytes_of(routing), nodes, like, relay=relay)
    grown = [DemandGroup(g.holders, more(g.sinks), g.stage, g.lots, g.nbytes) for g in groups]
    check_routing(grown, rewritten(routing, trees, more), nodes, relay)


@pytest.mark.parametrize("lost", [[0], [3], [0, 5], [1, 2, 3]])
def test_chains_without_a_replica_are_as_even_as_new_ones(lost):
    a, b = cpu_group("a", 1), cpu_group("b", 8)
    groups = replicated(1, 8, 1, 64 * GB)
    left, nodes, routing = leave(groups, hosts(a), hosts(b), cluster_of(a, b), lost)
    fresh = route(left, nodes, MIB, PlanOptions(MIB))
    assert busiest_s(routing, nodes) <= 1.02 * busiest_s(fresh, nodes)
    assert all(src != SOURCE for tree in routing.trees for src, _ in tree.hops[1:])


def test_a_replica_that_joins_makes_no_node_late():
    a, b = cpu_group("a", 1), cpu_group("b", 8)
    groups = replicated(1, 7, 1, 64 * GB)
    cluster = cluster_of(a, b)
    _, routing, *_ = plan(groups, hosts(a), hosts(b)[:7], cluster, MIB)
    nodes = nodes_of(hosts(a), hosts(b), cluster)
    trees = with_sinks(routing.trees, bytes_of(routing), nodes, {7: 0})
    patched = rewritten(routing, trees, lambda sinks: (*sinks, 7))
    fresh = route(replicated(1, 8, 1, 64 * GB), nodes, MIB, PlanOptions(MIB))
    assert busiest_s(patched, nodes) <= 1.02 * busiest_s(fresh, nodes)


def test_a_head_is_replaced_by_one_of_its_own_node():
    a, b = cpu_group("a", 1), gpu_group("b", 1, 4)
    _, nodes, routing = leave([group([0], [0, 1], GB)], hosts(a), hosts(b), cluster_of(a, b), [0])
    assert {t.sinks for t in routing.trees} == {(0,)}
    assert all(tree.hops == ((SOURCE, 0),) and tree.rails[0] >= 0 for tree in routing.trees)
    assert nodes.sinks[0].node == 1
