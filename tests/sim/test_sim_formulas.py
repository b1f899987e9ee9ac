"""The simulator against closed forms: chains, pipelines, contention, rails."""

from __future__ import annotations

import pytest

from wsync.plan.nodes import nodes_of
from wsync.sim.engine import Engine, Job, Resource
from wsync.sim.fabric import Fabric
from wsync.sim.sync import Sync
from wsync.sim.work import Road, Stream, Work
from wsync.spec.cluster import Cluster, Link, Nic, NodeGroup

FAST = 1e6
"""GB/s of what should not count."""


def machines(count, *, name="n", nics=1, rate=1.0, gpus=0, **rates):
    return NodeGroup(
        name,
        count,
        rates.get("host", FAST),
        num_gpus=gpus,
        hbm_gbps=rates.get("hbm", FAST) if gpus else None,
        pcie_gbps=rates.get("pcie", FAST) if gpus else None,
        nvlink_gbps=rates.get("nvlink"),
        nvlink_domain=rates.get("domain", gpus if "nvlink" in rates else 0),
        nics=tuple(Nic(rate, i) for i in range(nics)),
    )


def make_work(cluster, sources, sinks, flows, *, replicas=None, memory=("device", "device"), **options):
    """Flows are (rank, hops as (slot, slot, rail), sinks by slot, bytes, buckets); memory is that of both sides."""
    names = [name for g in cluster.groups for name in g.node_names]
    kept = {"source_memory": [memory[0]] * len(sources), "sink_memory": [memory[1]] * len(sinks)}
    nodes = nodes_of([names[i] for i in sources], [names[i] for i in sinks], cluster, **kept)
    fabric = Fabric(nodes)
    streams = [
        Stream(rank, 0, Road(fabric, nodes.sources[rank], hops, (-1, *at), nodes.sinks), nbytes, count)
        for rank, hops, at, nbytes, count in flows
    ]
    return Work(fabric, replicas or [f"r{i}" for i in range(len(sinks))], streams, **options)


@pytest.mark.parametrize("hops", [1, 2, 5, 16])
@pytest.mark.parametrize("buckets", [1, 7, 64])
def test_a_chain_takes_what_the_formula_says(hops, buckets):
    nbytes, alpha_s = 10**9, 1e-3
    cluster = Cluster((machines(hops + 1),), alpha_s=alpha_s)
    chain = [(i, i + 1, 0) for i in range(hops)]
    work = make_work(cluster, [0], [i + 1 for i in range(hops)], [(0, chain, range(hops), nbytes, buckets)])
    sync = Sync(work)
    sync.run()
    expected = (buckets + hops - 1) * (alpha_s + nbytes / (buckets * 1e9))
    assert sync.times.staged_s == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("buckets", [1, 4, 50])
@pytest.mark.parametrize("rates", [{"pcie": 5.0, "hbm": 30.0}, {"pcie": 0.5, "hbm": 30.0}, {"pcie": 5.0, "hbm": 2.0}])
def test_a_pipeline_takes_its_slowest_stage_and_a_bucket_of_the_others(buckets, rates):
    nbytes = 10**9
    cluster = Cluster((machines(2, gpus=1, **rates),), alpha_s=0.0)
    work = make_work(cluster, [0], [1], [(0, [(0, 1, 0)], [0], nbytes, buckets)], memory=("host", "device"))
    seconds = Sync(work, in_place=True).run()
    # gather over PCIe; pack reads and writes; the wire at 1 GB/s, or PCIe where it is slower; install reads and writes
    stages = [1 / rates["pcie"], 2 / rates["hbm"], max(1.0, 1 / rates["pcie"]), 2 / rates["hbm"]]
    assert seconds == pytest.approx(max(stages) + (sum(stages) - max(stages)) / buckets, rel=0.02)


def test_two_senders_share_the_port_of_one_receiver():
    cluster = Cluster((machines(3),), alpha_s=0.0)
    flows = [(rank, [(0, 1, 0)], [0], 10**9, 100) for rank in (0, 1)]
    work = make_work(cluster, [0, 1], [2], flows)
    assert Sync(work).run() == pytest.approx(2.0, rel=0.01)


def test_both_directions_of_a_port_are_used_at_once():
    cluster = Cluster((machines(2),), alpha_s=0.0)
    flows = [(0, [(0, 1, 0)], [1], 10**9, 100), (1, [(0, 1, 0)], [0], 10**9, 100)]
    work = make_work(cluster, [0, 1], [0, 1], flows)
    assert Sync(work).run() == pytest.approx(1.0, rel=0.01)


def test_a_shared_link_carries_what_all_nodes_together_send():
    groups = (machines(4, name="a"), machines(4, name="b"))
    cluster = Cluster(groups, (Link("wan", ("a",), ("b",), 2.0),), alpha_s=0.0)
    flows = [(rank, [(0, 1, 0)], [rank], 10**9, 50) for rank in range(4)]
    work = make_work(cluster, range(4), [4 + i for i in range(4)], flows)
    assert Sync(work).run() == pytest.approx(2.0, rel=0.01)


def test_a_gpu_reaches_the_other_ports_of_its_node_over_nvlink():
    cluster = Cluster((machines(2, nics=2, gpus=2, nvlink=0.5),), alpha_s=0.0)
    own = make_work(cluster, [0], [1], [(0, [(0, 1, 0)], [0], 10**9, 50)])
    other = make_work(cluster, [0], [1], [(0, [(0, 1, 1)], [0], 10**9, 50)])
    assert Sync(own).run() == pytest.approx(1.0, rel=0.01)
    assert Sync(other).run() == pytest.approx(2.0, rel=0.01)


def test_a_domain_across_nodes_needs_no_port():
    cluster = Cluster((machines(4, nics=1, rate=0.001, gpus=2, nvlink=1.0, domain=4),), alpha_s=0.0)
    inside = make_work(cluster, [0], [1], [(0, [(0, 1, -1)], [0], 10**9, 50)])
    assert Sync(inside).run() == pytest.approx(1.0, rel=0.01)


def test_scaled_buckets_wait_for_the_amaxes():
    cluster = Cluster((machines(2),), alpha_s=0.0)
    work = make_work(cluster, [0], [1], [(0, [(0, 1, 0)], [0], 10**9, 50)], amax_s=3.0)
    work.streams[0].waits = True
    assert Sync(work).run() == pytest.approx(4.0, rel=0.01)


def test_a_service_begins_when_the_one_before_has_ended():
    seen = []
    engine = Engine([Resource("r", "nic", 10.0)], lambda job, now: seen.append((job.tag, now)), merge_s=0.0)
    for tag in range(3):
        engine.submit(Job("x", tag, (0,), 5, 0.5))
    assert engine.run() == 3.0
    assert seen == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert engine.resources[0].busy_s == 3.0
    assert engine.resources[0].spans == [[0.0, 3.0, 3.0]]


def test_equal_seeds_give_equal_runs_and_jitter_keeps_the_mean():
    def once(seed):
        cluster = Cluster((machines(2),), alpha_s=0.0)
        work = make_work(cluster, [0], [1], [(0, [(0, 1, 0)], [0], 10**9, 400)])
        return Sync(work, jitter=0.3, seed=seed).run()

    assert once(1) == once(1)
    assert once(1) != once(2)
    assert once(1) == pytest.approx(1.0, rel=0.05)
