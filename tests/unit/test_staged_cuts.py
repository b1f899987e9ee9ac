"""What is kept in host memory: cuts and seconds in closed form, and against a linear program."""

import random

import msgspec
import pytest
from route_cases import MIB, check_routing, cluster_of, cpu_group, gpu_group, group, hosts, plan, random_gpu_case
from route_lp import optimum_of_gpus_s

from wsync.errors import ConfigError
from wsync.plan.cuts import find_bounds
from wsync.plan.flows import Flow, Tree
from wsync.plan.nodes import nodes_of
from wsync.plan.timing import plan_times, scan_s
from wsync.plan.types import SOURCE

GB = 10**9
PCIE = 10.0
HOST_GBPS = 400.0
WIDE = {"pcie_gbps": PCIE, "nic_gbps": 100.0}


def pair(a=1, b=1, **changes):
    """Trainer and engine nodes of four GPUs between which only PCIe is slow."""
    fields = {**WIDE, **changes}
    return gpu_group("a", a, 4, **fields), gpu_group("b", b, 4, **fields)


def of(bounds):
    return {b.name: b.seconds for b in bounds}


def loads_of(times):
    return {x.name: (x.nbytes, x.seconds) for x in times.loads}


def all_in(side, where="host"):
    return [where] * len(side)


def test_offloaded_weights_cross_the_pcie_of_the_rank_that_holds_them():
    a, b = pair()
    groups = [group([r], [r], (r + 1) * GB) for r in range(4)]
    sources, sinks = hosts(a), hosts(b)
    _, _, times, bounds = plan(groups, sources, sinks, cluster_of(a, b), MIB, memory=(all_in(sources), None))
    found = of(bounds)
    assert bounds[0].name == "staged through PCIe of GPU 3 of node a-0"
    assert found["staged through PCIe of GPU 3 of node a-0"] == pytest.approx(4 / PCIE)
    assert found["staged through PCIe of GPU 0 of node a-0"] == pytest.approx(1 / PCIE)
    assert found["staged through PCIe of GPU 0 of node a-0 and of 3 others"] == pytest.approx(10 / (4 * PCIE))
    # Reading is half of a copy, whose rate the cluster file has.
    assert found["staged through host memory of node a-0"] == pytest.approx(10 / (2 * HOST_GBPS))
    assert times.busiest_s == pytest.approx(bounds[0].seconds)
    assert loads_of(times)["PCIe of GPU 3 of node a-0 in"] == (4 * GB, pytest.approx(4 / PCIE))
    assert loads_of(times)["host memory of node a-0"] == (10 * GB, pytest.approx(10 / (2 * HOST_GBPS)))


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_copies_of_offloaded_weights_share_what_crosses_pcie(copies):
    a, b = pair(a=4)
    groups = [group(range(0, 4 * copies, 4), [0], 8 * GB)]
    sources, sinks = hosts(a), hosts(b)
    _, _, times, bounds = plan(groups, sources, sinks, cluster_of(a, b), MIB, memory=(all_in(sources), None))
    staged = [x.seconds for x in bounds if x.name.startswith("staged through PCIe")]
    assert max(staged) == pytest.approx(8 / (copies * PCIE))
    assert times.busiest_s >= max(staged) * (1 - 1e-9)
    gathered = [
        x.nbytes for x in times.loads if x.name.startswith("PCIe of GPU 0 of node a") and x.name.endswith(" in")
    ]
    assert sum(gathered) == 8 * GB


@pytest.mark.parametrize("bucket_bytes", [MIB, 64 * MIB])
def test_copies_on_two_nodes_are_gathered_by_all_of_their_gpus(bucket_bytes):
    """By their ports alone it would be as good if four GPUs of each node did all of it."""
    a, b = gpu_group("a", 2), gpu_group("b", 2)
    groups = [group([r, r + 8], [s, s + 8], GB) for r in range(8) for s in range(8)]
    sources = hosts(a)
    _, _, times, bounds = plan(
        groups, sources, hosts(b), cluster_of(a, b), bucket_bytes, memory=(all_in(sources), None)
    )
    gathered = [
        x.nbytes for x in times.loads if x.name.startswith("PCIe of GPU") and " a-" in x.name and x.name.endswith(" in")
    ]
    assert len(gathered) == 16
    assert max(gathered) <= 4 * GB + bucket_bytes * 8
    staged = max(x.seconds for x in bounds if x.name.startswith("staged through PCIe"))
    assert staged == pytest.approx(64 / (16 * 64.0))


def test_weights_that_one_holder_has_on_its_gpu_need_not_be_gathered():
    a, b = pair()
    nodes = nodes_of(hosts(a), hosts(b), cluster_of(a, b), source_memory=["host", "device", "host", "host"])
    groups = [group([0, 1], [0], GB), group([2, 3], [0], 2 * GB)]
    found = of(find_bounds(groups, nodes, host_bytes=[GB, 2 * GB]))
    staged = {name: seconds for name, seconds in found.items() if name.startswith("staged through PCIe")}
    assert staged == {"staged through PCIe of GPU 2 of node a-0 and of 1 other": pytest.approx(2 / (2 * PCIE))}


def test_a_narrow_wire_does_not_narrow_what_is_gathered():
    a, b = pair()
    nodes = nodes_of(hosts(a), hosts(b), cluster_of(a, b), source_memory=all_in(hosts(a)))
    found = of(find_bounds([group([0], [0], GB)], nodes, host_bytes=[4 * GB], nbytes=[GB // 2]))
    assert found["staged through PCIe of GPU 0 of node a-0"] == pytest.approx(4 / PCIE)


def test_what_engine_ranks_receive_through_host_memory_crosses_their_pcie_once():
    a, b = pair()
    groups = [group([0], [s], GB) for s in range(4)]
    sources, sinks = hosts(a), hosts(b)
    _, _, times, bounds = plan(groups, sources, sinks, cluster_of(a, b), MIB, memory=(None, all_in(sinks)))
    found, loads = of(bounds), loads_of(times)
    for gpu in range(4):
        assert found[f"staged through PCIe of GPU {gpu} of node b-0"] == pytest.approx(1 / PCIE)
        assert loads[f"PCIe of GPU {gpu} of node b-0 in"] == (GB, pytest.approx(1 / PCIE))
    # Written once and read once, which is a copy.
    assert found["staged through host memory of node b-0"] == pytest.approx(4 / HOST_GBPS)
    assert loads["host memory of node b-0"] == (8 * GB, pytest.approx(4 / HOST_GBPS))
    assert not any(name.startswith("install on") for name in found)
    assert not any(name.startswith("NVLink of GPU") and "node b" in name for name in loads)


def test_a_host_slower_than_its_pcie_links_together_binds_for_the_node():
    a, b = pair(host_gbps=15.0)
    groups = [group([s], [s], GB) for s in range(4)]
    sources, sinks = hosts(a), hosts(b)
    _, _, times, bounds = plan(groups, sources, sinks, cluster_of(a, b), MIB, memory=(None, all_in(sinks)))
    assert (bounds[0].name, bounds[0].seconds) == ("staged through host memory of node b-0", pytest.approx(4 / 15.0))
    assert times.busiest_s == pytest.approx(4 / 15.0)


def test_two_engine_ranks_of_a_node_copy_inside_its_memory():
    a, b = pair()
    nodes = nodes_of(hosts(a), hosts(b), cluster_of(a, b), sink_memory=all_in(hosts(b)))
    tree = Tree((0, 1), ((SOURCE, 0), (0, 1)), (0, -1))
    loads = loads_of(plan_times([tree], [Flow(0, 0, 0, 0, (), GB)], nodes, MIB))
    # Written by the port, read and written for the copy, read twice to be installed.
    assert loads["host memory of node b-0"][0] == 5 * GB
    assert loads["PCIe of GPU 0 of node b-0 in"][0] == loads["PCIe of GPU 1 of node b-0 in"][0] == GB


def test_ranks_that_share_a_gpu_share_its_pcie():
    a = gpu_group("a", 1, 4, **WIDE)
    groups = [group([0], [0], GB)]
    where = (["host"] * 4, ["host"] * 4)
    _, _, times, bounds = plan(groups, hosts(a), hosts(a), cluster_of(a), MIB, memory=where)
    assert bounds[0].name == "staged through PCIe of GPU 0 of node a-0"
    assert bounds[0].seconds == times.busiest_s == pytest.approx(2 / PCIE)
    assert loads_of(times)["PCIe of GPU 0 of node a-0 out"][0] == GB


def test_to_the_memory_of_its_own_node_a_gpu_sends_by_nvlink_and_all_of_its_pcie():
    a = gpu_group("a", 1, 4, 1.0, nvlink_gbps=50.0, pcie_gbps=60.0)
    groups = [group([0], [0], 50 * GB), group([0], [1], 60 * GB), group([1], [2], 110 * GB)]
    where = (None, ["device", "host", "device"])
    nodes = nodes_of(["a-0"] * 2, ["a-0"] * 3, cluster_of(a), [0, 1], [1, 2, 3], *where)
    found = of(find_bounds(groups, nodes))
    assert found["egress of trainer rank 0"] == pytest.approx(110 / (50 + 60))
    # A sink that keeps nothing in host memory may get its bytes from one that does.
    assert found["install on sink 2"] == pytest.approx(110 / (50 + 60))
    alone = of(find_bounds(groups, nodes.on_device()))
    assert alone["egress of trainer rank 0"] == pytest.approx(110 / (50 + 1))


def test_over_nodes_of_one_domain_bytes_go_by_way_of_the_gpus():
    a = gpu_group("a", 2, 2, nvlink_domain=4)
    nodes = nodes_of(["a-0"], ["a-0", "a-1"], cluster_of(a), [0], [1, 0], sink_memory=["host", "host"])
    tree = Tree((0, 1), ((SOURCE, 0), (0, 1)), (-1, -1))
    loads = {name: x[0] for name, x in loads_of(plan_times([tree], [Flow(0, 0, 0, 0, (), GB)], nodes, MIB)).items()}
    parts = {name: n for name, n in loads.items() if name.startswith(("NVLink", "PCIe", "host"))}
    assert parts == {
        "PCIe of GPU 0 of node a-0 out": GB,  # to the memory of the first node
        "PCIe of GPU 1 of node a-0 in": 2 * GB,  # installed there, and on the way to the second node
        "NVLink of GPU 1 of node a-0 out": GB,
        "NVLink of GPU 0 of node a-1 in": GB,
        "PCIe of GPU 0 of node a-1 out": GB,
        "PCIe of GPU 0 of node a-1 in": GB,
        "host memory of node a-0": 3 * GB,
        "host memory of node a-1": 2 * GB,
    }


def test_one_bucket_of_the_stages_beside_the_wire_fills_the_pipeline():
    a, b = pair()
    tree, flow = Tree((0,), ((SOURCE, 0),), (0,)), Flow(0, 0, 0, 0, (), GB)

    def fill_s(memory):
        nodes = nodes_of(hosts(a), hosts(b), cluster_of(a, b), source_memory=[memory] * 4, sink_memory=[memory] * 4)
        return plan_times([tree], [flow], nodes, 8 * MIB, host_bytes=[4 * GB, 0, 0, 0]).fill_s

    # Weights four times as wide as the wire come in before, and what has arrived goes up behind.
    assert fill_s("host") - fill_s("device") == pytest.approx(8 * MIB * (4 + 1) / (PCIE * GB))


def test_amaxes_of_offloaded_weights_are_found_over_pcie():
    a, b = pair()
    sources = hosts(a)
    here = nodes_of(sources, hosts(b), cluster_of(a, b))
    away = nodes_of(sources, hosts(b), cluster_of(a, b), source_memory=all_in(sources))
    scanned = [GB, 3 * GB, 0, 0]
    assert scan_s(here, scanned) == 0.0
    assert scan_s(away, scanned) == pytest.approx(3 / PCIE)
    tree, flow = Tree((0,), ((SOURCE, 0),), (0,)), Flow(0, 0, 0, 0, (), GB)
    before, after = (
        plan_times([tree], [flow], nodes, MIB, amax_elements=1000, scanned_bytes=scanned).amax_s
        for nodes in (here, away)
    )
    assert after - before == pytest.approx(3 / PCIE)


def test_without_gpus_memory_is_what_it_was():
    a, b = cpu_group("a", 2), cpu_group("b", 2)
    groups = [group([0, 1], [0, 1], GB)]
    device = plan(groups, hosts(a), hosts(b), cluster_of(a, b))
    host = plan(groups, hosts(a), hosts(b), cluster_of(a, b), memory=(["host"] * 2, ["host"] * 2))
    assert device[1:] == host[1:]


def test_a_memory_that_is_none_is_refused():
    a, b = pair()
    with pytest.raises(ConfigError, match="sink 2 keeps its weights in 'disk', allowed are 'device' and 'host'"):
        nodes_of(hosts(a), hosts(b), cluster_of(a, b), sink_memory=["host", "device", "disk", "host"])


def random_memory(rng, ranks):
    share = rng.choice([0.0, 0.5, 1.0])
    return ["host" if rng.random() < share else "device" for _ in ranks]


@pytest.mark.parametrize("batch", range(4))
def test_no_cut_is_above_the_optimum_and_no_plan_below_it(batch):
    binding = set()
    for seed in range(batch * 40, (batch + 1) * 40):
        groups, sources, sinks, cluster = random_gpu_case(seed)
        rng = random.Random(seed)
        memory = random_memory(rng, sources), random_memory(rng, sinks)
        if rng.random() < 0.5:
            slow = [msgspec.structs.replace(g, host_gbps=20.0) for g in cluster.groups]
            cluster = cluster_of(*slow)
        nodes, routing, times, bounds = plan(groups, sources, sinks, cluster, 256 * MIB, memory=memory)
        check_routing(groups, routing, nodes)
        optimum = optimum_of_gpus_s(groups, nodes)
        assert times.busiest_s >= optimum * (1 - 1e-6), seed
        if bounds:
            assert bounds[0].seconds <= optimum * (1 + 1e-6), (seed, bounds[0])
            binding.add(bounds[0].name.split(" of ")[0].split(" on ")[0])
    assert {"staged through PCIe", "staged through host memory", "install"} <= binding
