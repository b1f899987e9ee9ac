"""What is kept in host memory, simulated: parts and seconds are those of the plan, and manifests alone say it."""

from __future__ import annotations

import msgspec
import pytest
import test_sim_plans as plans
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim_formulas import machines, make_work

from wsync.cli.plan_host import install_s
from wsync.plan import make_plan
from wsync.plan.nodes import find_nodes
from wsync.plan.replan import Planner
from wsync.sim import Failure, SimOptions, simulate
from wsync.sim.memory import needed_bytes
from wsync.sim.presets import PRESETS
from wsync.sim.run import Simulation
from wsync.sim.scenario import Scenario
from wsync.sim.sync import Sync
from wsync.spec.cluster import Cluster
from wsync.spec.manifest import SinkManifest

SIDES = [("host", "device"), ("device", "host"), ("host", "host")]


def kept(source, sink, memory):
    """Both manifests with what ``memory`` says of each side."""
    ranks = tuple(msgspec.structs.replace(r, memory=memory[0]) for r in source.ranks)
    sinks = (msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, memory=memory[1])) for r in sink.ranks)
    return msgspec.structs.replace(source, ranks=ranks), SinkManifest(tuple(sinks))


def tiny(memory, machines_of="NVLink"):
    source, sink, cluster, options = plans.on_machines(plans.CLUSTERS[machines_of])
    return *kept(source, sink, memory), cluster, options


def parts_of(result):
    """Bytes of PCIe, NVLink, ports and host memories, as `wsync.plan.loads` names them."""
    out = {}
    for use in result.resources:
        node, _, part = use.name.partition("/")
        if use.kind == "host":
            out[f"host memory of node {node}"] = use.nbytes
        elif use.kind in ("pcie", "nvlink"):
            kind, way = part.split()
            name = {"pcie": "PCIe", "nvlink": "NVLink"}[use.kind]
            out[f"{name} of GPU {kind.removeprefix(use.kind)} of node {node} {way}"] = use.nbytes
    return out


@pytest.mark.parametrize("memory", SIDES)
@pytest.mark.parametrize("name", ["NVLink", "PCIe", "one port for all GPUs", "a domain of all engine nodes"])
def test_every_part_carries_what_the_plan_counts(name, memory):
    source, sink, cluster, options = tiny(memory, name)
    planner = Planner(source, cluster, options)
    plan = planner.plan(sink)
    times = planner.times(plan, sink)
    found = parts_of(simulate(plan, source, sink, cluster, options=SimOptions(install="in_place")))
    expected = {x.name: x.nbytes for x in times.loads if x.name.startswith(("PCIe", "NVLink", "host memory"))}
    # Where nothing else uses it, PCIe that is as fast as the ports behind it is left out.
    hidden = {part for part in expected.keys() - found.keys() if part.startswith("PCIe ")}
    staged = (
        ("trainer-", "engine-")
        if memory == ("host", "host")
        else ("trainer-",)
        if memory[0] == "host"
        else ("engine-",)
    )
    assert not any(f"node {side}" in part and part.endswith(" in") for part in hidden for side in staged)
    assert found.keys() | hidden == expected.keys()
    for part, nbytes in found.items():
        # What trainers gather is weights without the padding of buckets, rounded for each bucket.
        assert nbytes == pytest.approx(expected[part], rel=1e-3), part


@pytest.mark.parametrize("memory", SIDES)
@pytest.mark.parametrize("name", ["tiny", "wan-100g"])
def test_an_update_takes_about_what_its_plan_predicts(name, memory):
    source, sink, cluster, options = PRESETS[name].build()
    source, sink = kept(source, sink, memory)
    plan = make_plan(source, sink, cluster, options)
    result = simulate(plan, source, sink, cluster, options=SimOptions(install="in_place"))
    assert plan.score >= 1.0
    assert result.simulated_s >= plan.lower_bound_s
    assert result.simulated_s == pytest.approx(plan.time_s, rel=0.1)


def test_engines_that_write_after_the_vote_bring_everything_up_then():
    source, sink, cluster, options = tiny(("device", "host"))
    plan = make_plan(source, sink, cluster, options)
    staged, in_place = (
        simulate(plan, source, sink, cluster, options=SimOptions(install=install)) for install in ("staged", "in_place")
    )
    pause_s = install_s(plan, find_nodes(source, sink, cluster))
    assert staged.simulated_s - staged.phases["stage"] == pytest.approx(pause_s, rel=0.05)
    assert staged.simulated_s > in_place.simulated_s


def pipeline_s(buckets, **rates):
    """Seconds of 1 GB from one offloaded GPU to another one that receives through host memory, over 1 GB/s."""
    cluster = Cluster((machines(2, gpus=1, **rates),), alpha_s=0.0)
    flow = (0, [(0, 1, 0)], [0], 10**9, buckets)
    return Sync(make_work(cluster, [0], [1], [flow], memory=("host", "host")), in_place=True).run()


@pytest.mark.parametrize("buckets", [1, 4, 50])
@pytest.mark.parametrize("pcie", [5.0, 0.5])
def test_a_pipeline_through_host_memory_takes_its_slowest_stage_and_a_bucket_of_the_others(buckets, pcie):
    stages = [1 / pcie, 2 / 30.0, max(1.0, 1 / pcie), 1 / pcie]  # gather, pack, wire, install
    expected = max(stages) + (sum(stages) - max(stages)) / buckets
    assert pipeline_s(buckets, pcie=pcie, hbm=30.0) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("buckets", [1, 4, 50])
def test_the_memory_of_an_engines_node_is_written_and_read(buckets):
    one_pass = 1 / (2 * 0.3)
    expected = 2 * one_pass + one_pass / buckets  # and the trainer's is read for the first bucket before
    assert pipeline_s(buckets, host=0.3) == pytest.approx(expected, rel=0.02)


def test_a_scenario_that_says_offloaded_is_planned_so():
    source, sink, cluster, options = PRESETS["tiny"].build()
    says = Scenario("s", source, sink, cluster, options, SimOptions(install="in_place", offloaded=True))
    plan, _ = says.make_plan()
    offloaded, _ = kept(source, sink, ("host", "device"))
    assert plan == make_plan(offloaded, sink, cluster, options)
    assert plan.binding_cut.startswith("staged through PCIe")
    by_option = simulate(plan, source, sink, cluster, options=says.options)
    by_manifest = simulate(plan, offloaded, sink, cluster, options=SimOptions(install="in_place"))
    assert by_option.simulated_s == by_manifest.simulated_s
    assert 1.0 <= by_option.score <= 1.05


@given(st.integers(0, 2**32), st.sampled_from(SIDES), st.sampled_from(["staged", "in_place"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_rank_gets_its_bytes_and_no_plan_beats_its_bound(seed, memory, install, fails):
    rng, _, source, sink, cluster, where = plans.random_job(seed)
    source, sink = kept(source, sink, memory)
    plan = make_plan(source, sink, cluster)
    failures = (Failure(rng.choice(where), plan.time_s * rng.random(), rng.choice((None, 0))),) if fails else ()
    options = SimOptions(install=install, failures=failures, detect_s=plan.time_s * 0.1)
    simulation = Simulation(plan, source, sink, cluster, options)
    result = simulation.run()
    received = simulation._sync._received
    for replica, state in zip(simulation._sync.replicas.values(), result.replicas, strict=True):
        assert bool(state.fault) == (state.state != "committed")
        for sink_idx in replica.sinks if not state.fault else ():
            needed = [f.nbytes for f in plan.flows if sink_idx in {b for _, b in plan.trees[f.tree_idx].hops}]
            assert received[sink_idx] == sum(needed)
    if not fails:
        assert all(r.state == "committed" for r in result.replicas)
        assert result.simulated_s >= plan.lower_bound_s * (1 - 1e-9)


def test_gpus_hold_no_weights_that_are_offloaded_and_no_buckets_that_are_in_host_memory():
    source, sink, cluster, options = tiny(("device", "device"))
    plan = make_plan(source, sink, cluster, options)

    def most(memory, group):
        a, b = kept(source, sink, memory)
        nodes = find_nodes(a, b, cluster)
        needed = needed_bytes(plan, a, b, nodes, SimOptions())
        return max(n for (node, _), n in needed.items() if nodes.groups[node].name == group)

    assert most(("host", "device"), "trainer") == max(plan.source_memory_bytes(r) for r in range(plan.num_sources))
    gain = most(("device", "device"), "engine") - most(("device", "host"), "engine")
    assert gain == max(plan.sink_memory_bytes(s) for s in range(plan.num_sinks))
