"""Simulated plans: what they occupy is what the plan's timing counts, no bound is beaten, every rank gets its bytes."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from functools import partial

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.describe import describe_sink, describe_source, load_model
from wsync.errors import ConfigError, PlanMismatchError
from wsync.plan import PlanOptions, make_plan
from wsync.plan.nodes import find_nodes
from wsync.plan.timing import plan_times
from wsync.sim import Failure, SimOptions, Straggler, simulate
from wsync.sim.memory import needed_bytes
from wsync.sim.presets import PRESETS
from wsync.sim.presets.machines import h100
from wsync.sim.run import Simulation
from wsync.spec.cluster import Cluster, Nic, NicPath, NodeGroup
from wsync.spec.manifest import SinkManifest
from wsync.testing.generators import random_scenario


@pytest.fixture(scope="module")
def tiny():
    source, sink, cluster, options = PRESETS["tiny"].build()
    return make_plan(source, sink, cluster, options), source, sink, cluster


def bytes_of_parts(result, plan, sink):
    """As `wsync.plan.timing` names them. Memory of hosts without what engines install, which the timing leaves out."""
    out = {}
    for use in result.resources:
        node, _, part = use.name.partition("/")
        kind, index, way = re.fullmatch(r"([a-z]+)(\d*) ?(.*)", part).groups() if part else ("link", "", "")
        if use.kind == "nic":
            out[f"nic {index} of node {node} {way}"] = use.nbytes
        elif use.kind in ("nvlink", "pcie"):
            out[f"{ {'nvlink': 'NVLink', 'pcie': 'PCIe'}[kind] } of GPU {index} of node {node} {way}"] = use.nbytes
        elif use.kind == "host":
            out[f"memory of node {node}"] = use.nbytes - installed(plan, sink, node)
        elif use.kind == "link":
            out[use.name] = use.nbytes
    return out


def installed(plan, sink, node):
    """Bytes that the engine ranks of a node write: all that they receive."""
    received = [
        f.wire_bytes for f in plan.flows for _, b in plan.trees[f.tree_idx].hops if sink.ranks[b].info.host == node
    ]
    return sum(received)


H100 = h100("x", 1)
CLUSTERS = {
    "NVLink": H100,
    "PCIe": msgspec.structs.replace(H100, nvlink_gbps=None, nvlink_domain=0),
    "PCIe slower than the port": msgspec.structs.replace(H100, pcie_gbps=20.0),
    "one port for all GPUs": msgspec.structs.replace(H100, nics=(Nic(50.0, 0, (NicPath(0, "PIX"),)),)),
    "a domain of all engine nodes": msgspec.structs.replace(H100, nvlink_domain=16),
    "no GPUs": NodeGroup("x", 1, 300.0, nics=(Nic(50.0),)),
}


def on_machines(group):
    """The tiny preset on other machines. In bf16: the timing counts what packing writes, and here it reads as much."""
    source, sink, cluster, options = replace(PRESETS["tiny"], recipe="bf16").build()
    trainer, engine = (
        msgspec.structs.replace(group, name=g.name, count=max(g.count, group.nodes_per_domain)) for g in cluster.groups
    )
    return source, sink, msgspec.structs.replace(cluster, groups=(trainer, engine)), options


JOBS = {name: partial(on_machines, group) for name, group in CLUSTERS.items()} | {
    n: PRESETS[n].build for n in ("tiny", "wan-100g")
}
COMPARED = ("nic ", "link ", "NVLink ", "PCIe ", "memory of node ")


@pytest.mark.parametrize("name", JOBS)
def test_every_part_carries_what_the_timing_of_the_plan_counts(name):
    source, sink, cluster, options = JOBS[name]()
    plan = make_plan(source, sink, cluster, options)
    result = simulate(plan, source, sink, cluster)
    times = plan_times(plan.trees, plan.flows, find_nodes(source, sink, cluster), plan.bucket_bytes)
    expected = {x.name: x.nbytes for x in times.loads if x.name.startswith(COMPARED)}
    found = {part: nbytes for part, nbytes in bytes_of_parts(result, plan, sink).items() if nbytes}
    # PCIe is left out where it is as fast as the ports behind it and nothing else uses it.
    hidden = {part for part in expected.keys() - found.keys() if part.startswith("PCIe ")}
    assert not hidden or name not in ("PCIe", "PCIe slower than the port", "no GPUs")
    assert found == {part: nbytes for part, nbytes in expected.items() if part not in hidden}


SMALL = ("tiny", "wan-100g", "vllm-rdt-qwen3-235b", "prime-rl-glm-5")
"""Presets that are planned and simulated in seconds; `bench/test_simulator.py` has them all."""


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.deep) for n in PRESETS])
def test_no_preset_takes_much_more_than_its_bound(name):
    preset = PRESETS[name]
    source, sink, cluster, options = preset.build()
    plan = make_plan(source, sink, cluster, options)
    assert 1.0 <= simulate(plan, source, sink, cluster, options=preset.sim).score <= 1.05


@pytest.mark.parametrize("name", ["tiny", "wan-100g"])
def test_a_plan_takes_about_what_it_predicts(name):
    source, sink, cluster, options = PRESETS[name].build()
    plan = make_plan(source, sink, cluster, options)
    result = simulate(plan, source, sink, cluster, options=SimOptions(install="in_place"))
    assert result.simulated_s == pytest.approx(plan.time_s, rel=0.05)
    assert result.score == pytest.approx(result.simulated_s / plan.lower_bound_s)
    assert result.binding_cut == plan.binding_cut


def random_cluster(rng, hosts):
    nics = tuple(Nic(rng.choice((1.0, 12.5, 50.0)), i) for i in range(rng.randint(1, 3)))
    if rng.random() < 0.4:
        return Cluster((NodeGroup("n", len(hosts), 20.0, hosts=hosts, nics=nics),))
    gpus = rng.choice((1, 2, 4))
    nics = tuple(Nic(n.rate_gbps, n.rail, (NicPath(n.rail % gpus, "PIX"),)) for n in nics)
    domain = rng.choice((0, gpus)) if gpus > 1 else 0
    group = NodeGroup(
        "n",
        len(hosts),
        100.0,
        hosts=hosts,
        num_gpus=gpus,
        hbm_gbps=2000.0,
        pcie_gbps=25.0,
        nvlink_gbps=300.0 if domain else None,
        nvlink_domain=domain,
        nics=nics,
    )
    return Cluster((group,))


def random_job(seed):
    rng = random.Random(seed)
    scenario = random_scenario(rng)
    infos = [*scenario.source.ranks, *(r.info for r in scenario.sink.ranks)]
    hosts = tuple(dict.fromkeys(i.host for i in infos))
    cluster = random_cluster(rng, hosts)
    while True:
        try:
            plan = make_plan(scenario.source, scenario.sink, cluster, scenario.options)
            return rng, plan, scenario.source, scenario.sink, cluster, hosts
        except ConfigError:  # a GPU without a port of its own that must exchange bytes
            cluster = Cluster((NodeGroup("n", len(hosts), 20.0, hosts=hosts, nics=(Nic(12.5),)),))


@given(st.integers(0, 2**32), st.sampled_from(["staged", "in_place"]))
@settings(max_examples=60, deadline=None)
def test_every_rank_gets_its_bytes_and_no_plan_beats_its_bound(seed, install):
    _, plan, source, sink, cluster, _ = random_job(seed)
    result = simulate(plan, source, sink, cluster, options=SimOptions(install=install))
    assert all(r.state == "committed" for r in result.replicas)
    assert result.simulated_s >= plan.lower_bound_s * (1 - 1e-9)
    padded = sum(f.nbytes * len(plan.trees[f.tree_idx].hops) for f in plan.flows)
    assert result.delivered_bytes == padded
    assert result.num_hops == sum(plan.num_buckets(f) * len(plan.trees[f.tree_idx].hops) for f in plan.flows)


@given(st.integers(0, 2**32), st.floats(0.0, 1.2))
@settings(max_examples=60, deadline=None)
def test_whatever_fails_the_replicas_that_are_left_get_every_bucket_once(seed, when):
    rng, plan, source, sink, cluster, hosts = random_job(seed)
    failures = [
        Failure(host, plan.time_s * when * rng.random(), rng.choice((None, 0)))
        for host in rng.sample(hosts, rng.randint(1, len(hosts)))
    ]
    options = SimOptions(failures=tuple(failures), detect_s=plan.time_s * 0.1)
    simulation = Simulation(plan, source, sink, cluster, options)
    result = simulation.run()
    received = simulation._sync._received
    for replica, state in zip(simulation._sync.replicas.values(), result.replicas, strict=True):
        if state.fault:
            assert state.state in ("old version serving", "poisoned")
            continue
        assert state.state == "committed"
        for sink_idx in replica.sinks:
            needed = sum(f.nbytes for f in plan.flows if sink_idx in {b for _, b in plan.trees[f.tree_idx].hops})
            assert received[sink_idx] == needed


def test_equal_arguments_give_equal_results(tiny):
    def once():
        result = simulate(*tiny, options=SimOptions(jitter=0.2, seed=3))
        return result.simulated_s, result.resources, result.replicas

    assert once() == once()


def test_a_straggler_costs_what_it_lacks(tiny):
    healthy = simulate(*tiny)
    slow = simulate(*tiny, stragglers=[Straggler("trainer-0", 0.25)])
    assert slow.phases["stage"] == pytest.approx(4 * healthy.phases["stage"], rel=0.1)
    assert slow.lower_bound_s == healthy.lower_bound_s


def test_staged_engines_write_after_the_vote(tiny):
    staged = simulate(*tiny, options=SimOptions(install="staged"))
    in_place = simulate(*tiny, options=SimOptions(install="in_place"))
    assert staged.simulated_s > in_place.simulated_s
    assert staged.phases["stage"] == pytest.approx(in_place.phases["stage"], rel=0.05)


def test_offloaded_weights_cross_pcie_first(tiny):
    result = simulate(*tiny, options=SimOptions(offloaded=True))
    assert {r.kind for r in result.resources} >= {"pcie", "hbm", "nic"}
    assert result.stall_s > simulate(*tiny).stall_s


def test_a_dropped_replica_takes_the_score_along_and_utilisation_counts_the_whole_run():
    """A slow replica binds the bound; without it the others are done long before its other ranks have their bytes."""
    model = load_model("Qwen3-0.6B")
    slow = msgspec.structs.replace(h100("slow", 2), nics=tuple(Nic(5.0, n.rail, n.gpus) for n in h100("x", 1).nics))
    cluster = Cluster((h100("trainer", 1), h100("engine", 2), slow), alpha_s=1e-6)
    source = describe_source(model, "fsdp=8", ["trainer-0"] * 8)
    hosts = [host for host in ("engine-0", "engine-1", "slow-0", "slow-1") for _ in range(8)]
    sink = describe_sink(model, "tp=16,replicas=2", hosts, "bf16")
    plan = make_plan(source, sink, cluster, PlanOptions(bucket_bytes=512 << 10))
    options = SimOptions(install="in_place", detect_s=1e-4)
    whole = simulate(plan, source, sink, cluster, options=options)
    result = simulate(plan, source, sink, cluster, failures=[Failure("slow-0", 0.0)], options=options)
    assert whole.score >= 1.0
    assert result.score is None
    assert "1 did not commit" in result.no_score
    assert result.simulated_s < result.horizon_s
    assert max(use.utilisation for use in result.resources) <= 1.0 + 1e-9


def test_replicas_that_should_not_be_there_are_refused_if_the_plan_has_them(tiny):
    with pytest.raises(ConfigError, match="replica 'engine-0' should not be there, but the plan"):
        simulate(*tiny, options=SimOptions(without=("engine-0",)))


def test_the_memory_that_a_run_needs_is_weights_and_buckets(tiny):
    plan, source, sink, cluster = tiny
    needed = needed_bytes(plan, source, sink, find_nodes(source, sink, cluster), SimOptions())
    weights = 2 * sum(math.prod(t.shape) for t in source.tensors if t.alias_of is None)
    of_trainer = sum(nbytes for (node, _), nbytes in needed.items() if node == 0)
    staged = sum(plan.source_memory_bytes(rank) for rank in range(8))
    assert len(needed) == 24
    assert of_trainer == pytest.approx(weights + staged, rel=1e-6)


def test_a_plan_for_other_ranks_is_refused(tiny):
    plan, source, sink, cluster = tiny
    with pytest.raises(PlanMismatchError, match="16 engine ranks, the manifests have 8 and 8"):
        simulate(plan, source, SinkManifest(sink.ranks[:8]), cluster)


def test_a_failure_of_a_node_that_is_not_there_names_the_nearest(tiny):
    with pytest.raises(ConfigError, match="has no rank of this plan") as e:
        simulate(*tiny, failures=[Failure("engin-1", 0.1)])
    assert "engine-1" in e.value.hint


def test_the_ports_of_a_node_are_counted(tiny):
    with pytest.raises(ConfigError, match="has 8 ports, from 0 on; got 8"):
        simulate(*tiny, failures=[Failure("engine-1", 0.1, 8)])
