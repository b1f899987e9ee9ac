"""What routing decides: who relays, how often, where bytes enter a node, and what it refuses."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from route_cases import (
    MIB,
    check_routing,
    cluster_of,
    cpu_group,
    gpu_group,
    group,
    hosts,
    plan,
    replicated,
)

from wsync.errors import ConfigError
from wsync.plan.route.assign import Run
from wsync.plan.route.shapes import best_width, depth_of, find_parts, tree_of
from wsync.plan.route.steep import steep
from wsync.plan.route.stripes import Stripes
from wsync.plan.route.weave import trees_of_zones
from wsync.plan.types import SOURCE
from wsync.spec import Link

GB = 10**9


def shares_of(routing):
    for routes in routing.routes:
        for found in routes:
            for share in found.shares:
                yield routing.trees[share.tree_idx], share


@pytest.mark.parametrize("num_engines", [3, 4, 7])
def test_every_node_is_head_and_tail_of_chains_equally_often(num_engines):
    a, b = cpu_group("a", 1), cpu_group("b", num_engines)
    _, routing, *_ = plan(replicated(1, num_engines, 1, 32 * GB), hosts(a), hosts(b), cluster_of(a, b), MIB)
    heads, tails = Counter(), Counter()
    for tree, share in shares_of(routing):
        assert len(tree.hops) == num_engines
        heads[next(d for s, d in tree.hops if s == SOURCE)] += share.nbytes
        (tail,) = {d for _, d in tree.hops} - {s for s, _ in tree.hops}
        tails[tail] += share.nbytes
    for found in (heads, tails):
        assert set(found) == set(range(num_engines))
        assert max(found.values()) - min(found.values()) <= 2 * MIB


@pytest.mark.parametrize(("trainers", "engines"), [(4, 4), (4, 2), (8, 4)])
def test_nothing_is_relayed_where_it_buys_nothing(trainers, engines):
    a, b = cpu_group("a", trainers), cpu_group("b", engines)
    _, routing, *_ = plan(replicated(trainers, engines, 1, 32 * GB), hosts(a), hosts(b), cluster_of(a, b), MIB)
    assert all(src == SOURCE for tree in routing.trees for src, _ in tree.hops)


def test_engine_nodes_that_are_trainers_too_relay_less_than_others():
    a, b = cpu_group("a", 2, 50.0), cpu_group("b", 2, 50.0)
    everywhere = [*hosts(a), *hosts(b)]
    groups = [group([0], [1, 2, 3], 30 * GB), group([1], [2], 6 * GB)]
    _, routing, times, bounds = plan(groups, everywhere[:2], everywhere, cluster_of(a, b), MIB)
    assert times.busiest_s <= 1.01 * bounds[0].seconds
    relayed = Counter()
    for tree, share in shares_of(routing):
        for src, _ in tree.hops:
            relayed[src] += share.nbytes
    assert relayed[1] < min(relayed[2], relayed[3])


def test_slow_engine_nodes_relay_less():
    a, b, c = cpu_group("a", 1, 20.0), cpu_group("b", 2, 20.0), cpu_group("c", 2, 60.0)
    groups = [group([0], [0, 1, 2, 3], 30 * GB), group([1], [4], 20 * GB)]
    _, _, times, bounds = plan(groups, [*hosts(a), "b-0"], [*hosts(b), *hosts(c), "c-0"], cluster_of(a, b, c), MIB)
    assert times.busiest_s <= 1.01 * bounds[0].seconds


def test_what_is_on_a_gpu_stays_there_and_others_get_it_from_the_nearest():
    a = gpu_group("a", 1, 8, nvlink_domain=4)
    _, routing, *_ = plan([group([0, 5], range(8), GB)], hosts(a), hosts(a), cluster_of(a))
    by_sink = {}
    for routes in routing.routes:
        for found in routes:
            for sink in found.sinks:
                by_sink[sink] = {s.src_rank for s in found.shares}
    assert by_sink == {s: {0} if s < 4 else {5} for s in range(8)}


def test_a_sender_of_eight_nics_uses_all_of_them_for_nodes_of_one():
    a, b = gpu_group("a", 1, 8, 50.0), gpu_group("b", 8, 8, 50.0, nvlink_domain=0, num_nics=1)
    any_gpu = type(b)("b", 8, 400.0, num_gpus=8, hbm_gbps=3350.0, pcie_gbps=64.0, nics=(type(b.nics[0])(50.0),))
    groups = [group([0], [8 * i], 10 * GB) for i in range(8)]
    _, _, times, bounds = plan(groups, hosts(a), hosts(any_gpu), cluster_of(a, any_gpu))
    assert times.busiest_s <= 1.01 * bounds[0].seconds


def test_heads_without_nvlink_receive_on_what_they_reach_themselves():
    a, b = gpu_group("a", 1, 8, 50.0), gpu_group("b", 2, 8, 50.0, nvlink_domain=0)
    groups = [group([0], [i, 8 + i], 10 * GB) for i in range(8)]
    nodes, routing, times, bounds = plan(groups, hosts(a), hosts(b), cluster_of(a, b))
    check_routing(groups, routing, nodes)
    for tree in routing.trees:
        for (_, dst), rail in zip(tree.hops, tree.rails, strict=True):
            assert nodes.nics[nodes.sink_nic(dst, rail)].slot == nodes.sinks[dst].gpu
    assert times.busiest_s <= 1.02 * bounds[0].seconds


def test_bytes_cross_pcie_between_nvlink_domains_of_a_node_once_and_through_all_of_its_gpus():
    a = gpu_group("a", 1, 4, nvlink_domain=2)
    groups = [group([r], range(4), 8 * GB) for r in range(4)]
    nodes, routing, times, _ = plan(groups, hosts(a), hosts(a), cluster_of(a), MIB)
    check_routing(groups, routing, nodes)
    loads = {x.name: x.nbytes for x in times.loads if x.name.startswith("PCIe")}
    assert sum(n for name, n in loads.items() if name.endswith("in")) == 32 * GB
    assert len(loads) == 8
    assert max(loads.values()) == pytest.approx(8 * GB, rel=0.02)


def test_chains_go_on_in_other_zones_where_the_trainer_is_what_binds():
    leaves = [cpu_group(name, 3, 50.0) for name in ("a", "b", "c", "d")]
    links = [Link(f"up-{g.name}", (g.name,), tuple(x.name for x in leaves if x is not g), 200.0) for g in leaves]
    sinks = [h for g in leaves for h in hosts(g)][1:]
    groups = [group([0], range(len(sinks)), 40 * GB)]
    nodes, routing, times, bounds = plan(groups, hosts(leaves[0])[:1], sinks, cluster_of(*leaves, links=links), MIB)
    check_routing(groups, routing, nodes)
    assert times.busiest_s <= 1.02 * bounds[0].seconds


def test_a_byte_leaves_the_trainers_leaf_once_however_many_leaves_need_it():
    leaves = [cpu_group(name, 2, 50.0) for name in ("a", "b", "c", "d")]
    links = [Link(f"up-{g.name}", (g.name,), tuple(x.name for x in leaves if x is not g), 10.0) for g in leaves]
    sinks = [h for g in leaves[1:] for h in hosts(g)]
    groups = [group([r], range(len(sinks)), 20 * GB) for r in range(2)]
    nodes, routing, times, bounds = plan(groups, hosts(leaves[0]), sinks, cluster_of(*leaves, links=links), MIB)
    check_routing(groups, routing, nodes)
    loads = {x.name: x.nbytes for x in times.loads}
    assert loads["link up-a from a"] == 40 * GB
    assert times.busiest_s <= 1.005 * bounds[0].seconds


def test_bytes_go_by_way_of_a_zone_that_needs_them_too_where_the_direct_link_is_thin():
    sites = [cpu_group(name, 1, 50.0) for name in ("a", "b", "c")]
    links = [Link("ab", ("a",), ("b",), 10.0), Link("bc", ("b",), ("c",), 10.0), Link("ac", ("a",), ("c",), 1.0)]
    groups = [group([0], [0, 1], 11 * GB)]
    nodes, routing, times, _ = plan(groups, ["a-0"], ["b-0", "c-0"], cluster_of(*sites, links=links), MIB)
    check_routing(groups, routing, nodes)
    loads = {x.name: x.nbytes for x in times.loads}
    assert loads["link bc from b"] == pytest.approx(10 * GB, rel=0.02)
    assert loads["link ac from a"] == pytest.approx(GB, rel=0.1)
    # The rest goes the other way round: bytes of the thin link reach b by way of c.
    assert loads["link ab from a"] == pytest.approx(10 * GB, rel=0.02)
    assert times.busiest_s == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("num_zones", range(1, 8))
def test_every_tree_of_zones_reaches_every_zone_once(num_zones):
    trees = trees_of_zones(tuple(range(num_zones)), lambda a, b: abs(a - b))
    assert len(trees) == len(set(trees))
    assert num_zones > 3 or len(trees) == (num_zones + 1) ** (num_zones - 1)
    for hops in trees:
        have = {-1}
        for a, b in hops:
            assert a in have
            assert b not in have
            have.add(b)
        assert have == {-1, *range(num_zones)}


def test_trees_of_many_zones_are_few():
    assert [len(trees_of_zones(tuple(range(n)), lambda a, b: abs(a - b))) <= 4 * n for n in (16, 64)] == [True, True]


def test_no_path_names_both_nodes():
    a, b, c = cpu_group("a", 1), gpu_group("b", 1, 2, num_nics=0), cpu_group("c", 1)
    cluster = cluster_of(a, b, c)
    with pytest.raises(ConfigError, match=r"'a-0'.*'b-0'.*0 nics"):
        plan([group([0], [0], GB)], hosts(a), hosts(b), cluster)
    with pytest.raises(ConfigError, match=r"'b-0'.*'c-0'.*0 nics"):
        plan([group([0], [0], GB)], hosts(b), hosts(c), cluster)


@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 100), st.data())
def test_parts_have_the_degrees_that_were_asked_for(count, width, seed, data):
    source = data.draw(st.integers(1, count))
    weights = [data.draw(st.integers(0, 5)) for _ in range(count)]
    total = sum(weights)
    if not total:
        source, weights, total = count, [0] * count, 1
    relays = [w / total * (count - source) for w in weights]
    parts = find_parts(source, relays, width)
    got, start = [0.0] * count, 0.0
    for turn, part in enumerate(parts):
        assert part.source + sum(part.islands) == count
        for i, degree in enumerate(part.islands):
            got[i] += degree * (part.end - start)
        start = part.end
        have = {-1}
        for src, dst in tree_of(part, turn + seed):
            assert src in have
            have.add(dst)
        assert len(have) == count + 1
    assert start == 1.0
    assert got == pytest.approx(relays, abs=1e-4)


def test_trees_are_wide_only_where_chains_fill_slowly():
    assert depth_of(64, 1, 1) == 63
    assert depth_of(64, 1, 2) == 6
    assert best_width(64, 1, 5e-6, 80e-6, 1.0) == 1
    assert best_width(64, 1, 5e-6, 80e-6, 1e-6) > 1


def test_many_nodes_and_a_small_model_are_done_soon_after_the_bound():
    a, b = cpu_group("a", 1, 400.0), cpu_group("b", 64, 400.0)
    cluster = cluster_of(a, b, alpha_s=5e-7)
    _, _, times, bounds = plan(replicated(1, 64, 1, 8 * GB), hosts(a), hosts(b), cluster, 8 * MIB)
    assert times.time_s <= 1.05 * bounds[0].seconds


def test_a_rank_serves_the_sink_on_its_own_gpu_itself():
    a = gpu_group("a", 1, 8)
    _, routing, *_ = plan([group([2, 5], [2, 5], GB)], hosts(a), hosts(a), cluster_of(a))
    served = {(share.src_rank, tree.sinks) for tree, share in shares_of(routing)}
    assert served == {(2, (2,)), (5, (5,))}


def test_steepness_is_made_of_products_alone():
    levels = np.random.default_rng(7).random(20_000) * 3
    powers = steep(levels)
    for level, power in zip(levels.tolist(), powers.tolist(), strict=True):
        squares = [level]
        for _ in range(4):
            squares.append(squares[-1] * squares[-1])
        expected = level
        for square in squares[1:]:
            expected *= square
        assert power == expected


def test_a_run_that_carries_nothing_has_no_pieces():
    assert Stripes.__new__(Stripes)._cut([(0, Run(0, 0), [])]) == []
