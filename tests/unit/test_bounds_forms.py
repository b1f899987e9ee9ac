"""Cuts in closed form."""

import pytest
from route_cases import MIB, cluster_of, cpu_group, fsdp, gpu_group, group, hosts, moe_groups, plan, replicated

from wsync.errors import ConfigError
from wsync.plan.cuts import find_bounds
from wsync.plan.flows import LOCAL, Flow, Tree
from wsync.plan.nodes import nodes_of
from wsync.plan.timing import amax_s, plan_times
from wsync.plan.types import SOURCE
from wsync.spec import Link, NodeGroup

GB = 10**9
B = 50.0


def seconds(bounds):
    return {b.name: b.seconds for b in bounds}


def bounds_of(groups, sources, sinks, cluster, **options):
    return seconds(find_bounds(groups, nodes_of(sources, sinks, cluster), **options))


@pytest.mark.parametrize(("trainers", "replicas", "k"), [(2, 4, 1), (4, 2, 2), (1, 8, 1), (3, 2, 3), (4, 4, 2)])
def test_the_symmetric_case_has_the_cuts_of_the_design(trainers, replicas, k):
    a, b = cpu_group("a", trainers, B), cpu_group("b", replicas * k, B)
    unique = 48 * GB
    groups = replicated(trainers, replicas, k, unique)
    cluster = cluster_of(a, b)
    _, _, times, bounds = plan(groups, hosts(a), hosts(b), cluster, MIB)
    found = seconds(bounds)
    total = unique / 1e9
    assert found["ingress of node b-0"] == pytest.approx(total / (k * B))
    relayed = "egress of all trainer nodes" if trainers > 1 else "egress of node a-0"
    assert found[relayed] == pytest.approx(total / (trainers * B))
    alone = bounds_of(groups, hosts(a), hosts(b), cluster, relay=False)
    num_engines = replicas * k
    assert alone[relayed] == pytest.approx(num_engines * total / (k * trainers * B))
    gain = max(alone.values()) / max(found.values())
    assert gain == pytest.approx(max(1 / k, num_engines / (k * trainers)) / max(1 / k, 1 / trainers))
    if k == 1 and trainers <= num_engines:
        assert gain == pytest.approx(max(1.0, num_engines / trainers))
    assert times.busiest_s == pytest.approx(max(found.values()), rel=0.002)


@pytest.mark.parametrize(("trainers", "engines", "per_node"), [(2, 2, 4), (1, 3, 2)])
def test_deduplication_gains_the_replicas_of_a_node(trainers, engines, per_node):
    a = cpu_group("a", trainers, B)
    one = gpu_group("b", engines, 8, B / 8)
    whole = 40 * GB
    size = 8 // per_node
    groups = replicated(trainers, engines * per_node, size, whole)
    alone = bounds_of(groups, hosts(a), hosts(one), cluster_of(a, one), relay=False)
    relayed = "egress of all trainer nodes" if trainers > 1 else "egress of node a-0"
    num_replicas = engines * per_node
    without_dedup = num_replicas * whole / 1e9 / (trainers * B)
    assert without_dedup / alone[relayed] == pytest.approx(per_node)


def test_a_wire_of_bf16_doubles_what_fp8_needs():
    a, b = cpu_group("a", 1), cpu_group("b", 1)
    groups = [group([0], [0], GB)]
    nodes = nodes_of(hosts(a), hosts(b), cluster_of(a, b))
    fp8, bf16 = find_bounds(groups, nodes)[0], find_bounds(groups, nodes, nbytes=[2 * GB])[0]
    assert bf16.seconds == pytest.approx(2 * fp8.seconds)


def test_an_nvl72_domain_is_one_node():
    a, b = gpu_group("a", 2, 4, 50.0), gpu_group("b", 36, 4, 50.0, nvlink_domain=72, nvlink_gbps=900.0)
    groups = [group([0], range(72), 7 * GB), group([4], range(144), 14 * GB)]
    found = bounds_of(groups, hosts(a), hosts(b), cluster_of(a, b))
    assert found["ingress of NVLink domain 0 of group b"] == pytest.approx(21 / (72 * 50.0))
    assert found["ingress of NVLink domain 1 of group b"] == pytest.approx(14 / (72 * 50.0))
    assert found["egress of node a-1"] == pytest.approx(14 / 200.0)


def test_packing_reads_and_writes_the_memory_of_its_gpu():
    a, b = gpu_group("a", 1, 2), gpu_group("b", 1, 2)
    groups = [group([0], [0], GB), group([0, 1], [1], GB)]
    found = bounds_of(groups, hosts(a), hosts(b), cluster_of(a, b), packed_bytes=[3 * GB, 6 * GB])
    assert found["quantise on trainer rank 0"] == pytest.approx(3 / 3350.0)
    assert found["quantise on all trainer ranks"] == pytest.approx(9 / 6700.0)


def test_packing_on_one_gpu_shares_its_memory():
    a, b = gpu_group("a", 1, 2), gpu_group("b", 1, 2)
    packed = [6 * GB, 2 * GB, 4 * GB]  # ranks 0 and 2 are on GPU 0
    groups = [group([i], [0], GB) for i in range(3)]
    nodes = nodes_of(hosts(a, 3), hosts(b), cluster_of(a, b))
    found = seconds(find_bounds(groups, nodes, packed_bytes=packed))
    assert found["quantise on all trainer ranks"] == pytest.approx(12 / 6700.0)
    times = plan_times([Tree((0,), ((SOURCE, 0),), (0,))], [Flow(0, 0, 0, 0, (), GB)], nodes, GB, packed_bytes=packed)
    loads = {x.name: x.seconds for x in times.loads}
    assert loads["memory of GPU 0 of node a-0"] == pytest.approx(10 / 3350.0)
    assert loads["memory of GPU 1 of node a-0"] == pytest.approx(2 / 3350.0)


def test_between_nvlink_domains_of_a_node_pcie_carries_more_than_its_nics_do():
    a = gpu_group("n", 1, 4, 1.0, nvlink_domain=2, nvlink_gbps=50.0, pcie_gbps=60.0)
    groups = [group([3], [2], 50 * GB), group([0], [2], 60 * GB)]
    _, _, times, bounds = plan(groups, hosts(a), hosts(a), cluster_of(a), MIB)
    assert (bounds[0].name, bounds[0].seconds) == ("install on sink 2", pytest.approx(110 / (50 + 60)))
    assert times.busiest_s == pytest.approx(bounds[0].seconds)
    apart = [group([0], [1], 50 * GB), group([0], [2], 60 * GB)]
    assert bounds_of(apart, hosts(a), hosts(a), cluster_of(a))["egress of trainer rank 0"] == pytest.approx(1.0)


def test_of_cuts_with_one_name_the_slowest_counts():
    a, b = cpu_group("a", 9, B), cpu_group("b", 1, B)
    # Three sets of nodes that all begin with node a-0 and have six nodes.
    sets = [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 6), (0, 1, 2, 3, 4, 7)]
    groups = [group(held, [0], n * GB) for held, n in zip(sets, (60, 30, 20), strict=True)]
    found = bounds_of([*groups, group([8], [0], GB)], hosts(a), hosts(b), cluster_of(a, b))
    assert found["egress of node a-0 and 5 others that hold the same bytes"] == pytest.approx(60 / (6 * B))


def test_amaxes_cross_shared_links():
    a, b = cpu_group("a", 3), cpu_group("b", 3)
    cluster = cluster_of(a, b, links=[Link("wan", ("a",), ("b",), 0.001)])
    num_elements = 25_000_000
    assert amax_s(nodes_of(hosts(a), hosts(b), cluster), num_elements) < 1.0
    found = amax_s(nodes_of(hosts(a) + hosts(b), hosts(a), cluster), num_elements)
    assert found == pytest.approx(2 * 5 / 6 * 0.1 / 0.001)


def test_amaxes_cross_pcie_between_nvlink_domains():
    a = gpu_group("a", 1, 4, nvlink_domain=2)
    assert amax_s(nodes_of(hosts(a), hosts(a), cluster_of(a)), GB) == pytest.approx(2 * 3 / 4 * 4 / 64.0)
    assert amax_s(nodes_of(hosts(a)[:2], hosts(a), cluster_of(a)), GB) == pytest.approx(4 / 450.0)


def test_trainers_that_cannot_exchange_amaxes_are_named():
    a, b = cpu_group("a", 1), NodeGroup("b", 1, 10.0)
    nodes = nodes_of(["a-0", "b-0"], ["a-0"], cluster_of(a, b))
    with pytest.raises(ConfigError, match=r"no path from node 'b-0' to node 'a-0', whose trainer ranks exchange"):
        amax_s(nodes, 1)
    assert amax_s(nodes, 0) == 0.0
    assert amax_s(nodes_of(["b-0", "b-0"], ["b-0"], cluster_of(a, b)), 1) > 0.0


def test_messages_are_as_many_as_flows_have_buckets():
    a, b = cpu_group("a", 1), cpu_group("b", 1)
    nodes = nodes_of(hosts(a), hosts(b), cluster_of(a, b, alpha_s=1e-3))
    trees, flows = [Tree((0,), ((SOURCE, 0),), (0,))], [Flow(0, 0, 0, 0, (), 10 * MIB)]
    few = plan_times(trees, flows, nodes, MIB)
    many = plan_times(trees, flows, nodes, MIB, flow_buckets=[14])
    assert many.busiest_s - few.busiest_s == pytest.approx(4e-3)
    with pytest.raises(ValueError, match="zip"):
        plan_times(trees, flows, nodes, MIB, flow_buckets=[14, 1])


def test_nodes_without_gpus_copy_in_their_memory():
    a, b = cpu_group("a", 1), cpu_group("b", 1)
    slow = type(b)("b", 1, 10.0, nics=b.nics)
    found = bounds_of([group([0], [0], GB)], hosts(a), hosts(slow), cluster_of(a, slow))
    assert found["host memory of node b-0"] == pytest.approx(0.1)


def test_holders_of_a_pipeline_stage_are_a_cut_of_their_own():
    a, b = cpu_group("a", 4, B), cpu_group("b", 4, B)
    # The first stage, of two nodes, has four times the bytes of the second.
    groups = [group([0, 1], [0], 40 * GB), group([2, 3], [1], 10 * GB)]
    found = bounds_of(groups, hosts(a), [*hosts(b)[:2]], cluster_of(a, b))
    assert found["egress of node a-0, node a-1"] == pytest.approx(40 / (2 * B))


def test_every_copy_of_a_byte_enters_a_leaf_by_its_uplink_once():
    leaves = [cpu_group(name, 4, B) for name in ("a", "b", "c")]
    links = [Link(f"up-{g.name}", (g.name,), tuple(x.name for x in leaves if x is not g), 25.0) for g in leaves]
    groups = [group([0], range(8), 10 * GB)]
    sinks = hosts(leaves[1]) + hosts(leaves[2])
    _, _, times, bounds = plan(groups, hosts(leaves[0])[:1], sinks, cluster_of(*leaves, links=links))
    found = seconds(bounds)
    assert found["link up-a from a"] == pytest.approx(10 / 25.0)
    assert found["link up-b from a+c"] == pytest.approx(10 / 25.0)
    assert times.busiest_s <= 1.02 * bounds[0].seconds


def test_a_zone_is_reached_over_its_link_and_from_its_own_holders():
    a, b = cpu_group("a", 1, 25.0), cpu_group("b", 2, 10.0)
    link = Link("wan", ("a",), ("b",), 5.0)
    found = bounds_of([group([0, 1], [0], 15 * GB)], ["a-0", "b-0"], ["b-1"], cluster_of(a, b, links=[link]))
    assert found["egress of node b-0 with link wan from a"] == pytest.approx(1.0)


def test_demand_of_two_zones_crosses_the_link_between_them_however_wide_the_way_round():
    sites = [cpu_group(name, 1, 50.0) for name in ("a", "b", "c")]
    links = [Link("ab", ("a",), ("b",), 40.0), Link("bc", ("b",), ("c",), 40.0), Link("ac", ("a",), ("c",), 1.0)]
    found = bounds_of([group([0], [0], 4 * GB)], ["a-0"], ["c-0"], cluster_of(*sites, links=links))
    assert found["link ac from a"] == 4.0


def test_links_much_slower_than_others_are_counted_once():
    sites = [cpu_group(f"g{i}", 1) for i in range(3)]
    links = [
        Link("wan", ("g0",), ("g1",), 0.0005),
        Link("core", ("g0",), ("g2",), 1e6),
        Link("core2", ("g1",), ("g2",), 1e6),
    ]
    groups = [group([0], [0, 1], MIB)]
    found = bounds_of(groups, ["g0-0"], ["g1-0", "g2-0"], cluster_of(*sites, links=links))
    assert found["link wan from g0 and link core from g0"] == pytest.approx(MIB / (1e6 + 0.0005) / 1e9)


def test_ports_behind_which_few_needers_are_bind_before_the_node():
    a, b = gpu_group("a", 1, 8, 50.0), gpu_group("b", 1, 8, 50.0, nvlink_domain=0)
    found = bounds_of([group([0], [3], 10 * GB)], hosts(a), hosts(b), cluster_of(a, b))
    assert found["ingress of nics 3 of node b-0"] == pytest.approx(10 / 50.0)
    assert found["ingress of node b-0"] == pytest.approx(10 / 400.0)


def test_kimi_k2_on_replicas_of_two_and_four_nodes_needs_what_the_design_says():
    a, b = gpu_group("a", 32, 8, 50.0), gpu_group("b", 16, 8, 50.0)
    for per_replica, expected in ((16, 1.29), (32, 0.64)):
        groups = moe_groups(fsdp(256), 128 // per_replica, per_replica, 0, 1030 * GB)
        _, _, times, bounds = plan(groups, hosts(a), hosts(b), cluster_of(a, b), 16 * MIB)
        assert bounds[0].seconds == pytest.approx(expected, rel=0.01)
        assert times.time_s <= 1.05 * bounds[0].seconds


def test_a_trainer_rank_and_a_sink_on_one_gpu_share_its_nvlink():
    a = gpu_group("a", 1, 2, 50.0)
    nodes = nodes_of(hosts(a)[:1], hosts(a), cluster_of(a))
    direct, passed_on = Tree((1,), ((SOURCE, 1),), (LOCAL,)), Tree((0, 1), ((SOURCE, 0), (0, 1)), (LOCAL, LOCAL))
    flows = [Flow(0, 0, 0, 0, (), GB), Flow(9, 0, 0, 1, (), 2 * GB)]
    loads = {x.name: x.nbytes for x in plan_times([direct, passed_on], flows, nodes, GB).loads}
    assert loads["NVLink of GPU 0 of node a-0 out"] == loads["NVLink of GPU 1 of node a-0 in"] == 3 * GB
    assert loads["memory of trainer rank 0's GPU"] == 2 * GB
