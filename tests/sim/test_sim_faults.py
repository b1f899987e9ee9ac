"""Ports and nodes that fail while an update is under way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim_formulas import FAST, machines, make_work

from wsync.sim.faults import Faults
from wsync.sim.sync import Sync
from wsync.spec.cluster import Cluster, Nic, NodeGroup


def run(work, *, ports=(), nodes=(), detect_s=0.0, **options):
    sync = Sync(work, **options)
    faults = Faults(sync, detect_s)
    for node, nic, time_s in ports:
        faults.schedule_port(node, nic, time_s)
    for node, time_s in nodes:
        faults.schedule_node(node, time_s)
    return sync, faults, sync.run()


def two_rails(buckets=100):
    cluster = Cluster((machines(2, nics=2),), alpha_s=0.0)
    flows = [(0, [(0, 1, rail)], [0], 10**9, buckets) for rail in (0, 1)]
    return make_work(cluster, [0], [1], flows)


def test_what_crossed_a_failed_port_goes_over_the_other_one():
    _, faults, seconds = run(two_rails(), ports=[(0, 0, 0.5)])
    # 0.5 s on two ports carry half; the other half, 1 GB, goes over one.
    assert seconds == pytest.approx(1.5, rel=0.03)
    assert faults.resent > 0


def test_every_bucket_arrives_once_though_a_port_failed():
    work = two_rails(10)
    sync, _, _ = run(work, ports=[(1, 1, 0.3)])
    assert all(bucket.have == 0b11 for bucket in sync.buckets)
    assert sync.replicas["r0"].state == "committed"
    assert sum(sync._received) == sum(b.nbytes for b in sync.buckets)


def test_a_failure_is_acted_on_only_after_it_was_noticed():
    _, _, seconds = run(two_rails(), ports=[(0, 0, 0.5)], detect_s=4.0)
    # Noticed at 4.5 s; what was left for that port, half of its bytes, takes another 0.5 s.
    assert seconds == pytest.approx(5.0, rel=0.02)


def chain_of(count, buckets=50):
    cluster = Cluster((machines(count + 1),), alpha_s=0.0)
    chain = [(i, i + 1, 0) for i in range(count)]
    return make_work(cluster, [0], [i + 1 for i in range(count)], [(0, chain, range(count), 10**9, buckets)])


def test_a_dead_relay_takes_its_own_replica_only():
    sync, faults, seconds = run(chain_of(4), nodes=[(2, 0.5)])
    states = {name: r.state for name, r in sync.replicas.items()}
    assert states == {"r0": "committed", "r1": "old version serving", "r2": "committed", "r3": "committed"}
    assert "n-1 failed" not in str(faults.log)
    assert faults.log == [(0.5, "node n-2 failed")]
    assert sync.replicas["r1"].fault == "node n-2 failed"
    assert faults.adopted == 1
    assert seconds == pytest.approx(1.0, rel=0.2)


def test_nobody_gets_a_bucket_twice_though_relays_die_one_after_the_other():
    work = chain_of(6, 40)
    sync, _, _ = run(work, nodes=[(1, 0.2), (3, 0.4), (2, 0.41)], detect_s=0.05)
    alive = [i for i in range(6) if i + 1 not in (1, 2, 3)]
    for i in alive:
        assert sync._received[i] == 10**9
        assert sync.replicas[f"r{i}"].state == "committed"


def test_a_node_that_lost_its_last_port_counts_as_dead():
    sync, faults, _ = run(chain_of(3), ports=[(2, 0, 0.5)])
    assert sync.replicas["r1"].fault == "node n-2 has a rank without a port"
    assert sync.replicas["r2"].state == "committed"
    assert [words for _, words in faults.log] == ["port 0 of node n-2 failed", "node n-2 has a rank without a port"]


def test_without_a_trainer_node_only_what_was_staged_commits():
    sync, _, _ = run(chain_of(2), nodes=[(0, 0.5)])
    assert {r.state for r in sync.replicas.values()} == {"old version serving"}
    assert "trainer" in sync.replicas["r0"].fault


def test_an_engine_that_dies_while_it_writes_in_place_is_poisoned():
    sync, _, _ = run(chain_of(2), nodes=[(2, 0.5)], in_place=True)
    assert sync.replicas["r1"].state == "poisoned"


def test_a_failure_after_the_end_changes_nothing():
    sync, faults, seconds = run(chain_of(2), nodes=[(2, 50.0)], ports=[(1, 0, 49.0)])
    assert seconds < 50.0
    assert faults.log == []
    assert [words for _, words in faults.late] == ["port 0 of node n-1 failed", "node n-2 failed"]
    assert sync.horizon_s == pytest.approx(seconds)
    assert {r.state for r in sync.replicas.values()} == {"committed"}


def test_a_bucket_that_another_sender_has_brought_is_not_sent_again():
    """One rank's port fails, then its sender, while a third node's failure is about to be noticed."""
    cluster = Cluster((machines(4, nics=2),), alpha_s=0.0)
    hops = [(0, 1, 0), (1, 2, 0), (0, 3, 1)]
    work = make_work(cluster, [0], [1, 2, 3], [(0, hops, [0, 1, 2], 10**9, 10)])
    sync = Sync(work)
    faults = Faults(sync, 0.3)
    faults.schedule_port(2, 0, 0.45)
    for node, time_s in ((3, 0.4), (1, 0.5)):
        faults.schedule_node(node, time_s)
    sync.run()
    assert sync._received[1] == 10**9
    assert all(bucket.have >> 2 & 1 for bucket in sync.buckets)
    assert sync.replicas["r1"].state == "committed"


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_whatever_ports_and_nodes_of_one_chain_fail_every_replica_that_commits_has_all_buckets_once(data):
    count = data.draw(st.integers(3, 5))
    cluster = Cluster((machines(count + 1, nics=2),), alpha_s=0.0)
    parents = [data.draw(st.integers(max(0, i - 2), i)) for i in range(count)]
    hops = [(parent, i + 1, data.draw(st.integers(0, 1))) for i, parent in enumerate(parents)]
    work = make_work(cluster, [0], range(1, count + 1), [(0, hops, range(count), 10**9, 10)])
    when = st.integers(0, 30).map(lambda tick: tick / 20 + 0.01)  # close to each other, so that they meet
    engines = st.integers(1, count)
    ports = data.draw(st.lists(st.tuples(engines, st.integers(0, 1), when), min_size=1, max_size=3))
    nodes = data.draw(st.lists(st.tuples(engines, when), min_size=1, max_size=3))
    sync, _, _ = run(
        work,
        ports=ports,
        nodes=nodes,
        detect_s=data.draw(st.sampled_from((0.0, 0.1, 0.3, 0.5))),
        in_place=data.draw(st.booleans()),
    )
    for i, replica in enumerate(sync.replicas.values()):
        assert (replica.state == "committed") == (not replica.fault)
        if not replica.fault:
            assert sync._received[i] == 10**9
            assert all(bucket.have >> (i + 1) & 1 for bucket in sync.buckets)


def test_an_engine_that_dies_while_its_ranks_vote_does_not_commit():
    for in_place in (False, True):
        sync, _, seconds = run(chain_of(1), nodes=[(1, 1.5)], in_place=in_place, vote_s=1.0)
        assert sync.replicas["r0"].fault == "node n-1 failed"
        assert seconds is None


def test_an_engine_that_dies_before_it_has_written_serves_the_old_version():
    sync, _, _ = run(chain_of(2), nodes=[(2, 0.001)], in_place=True)
    assert sync.replicas["r1"].state == "old version serving"


def test_a_failure_takes_no_node_whose_name_only_begins_alike():
    group = NodeGroup("g", 3, FAST, hosts=("t", "a", "a/b"), nics=(Nic(1.0),))
    cluster = Cluster((group,), alpha_s=0.0)
    flows = [(0, [(0, 1, 0)], [sink], 10**9, 10) for sink in (0, 1)]
    sync, _, _ = run(make_work(cluster, [0], [1, 2], flows), nodes=[(1, 0.5)])
    assert {name: r.state for name, r in sync.replicas.items()} == {"r0": "old version serving", "r1": "committed"}


def test_a_part_that_fails_was_busy_until_then():
    sync, _, _ = run(chain_of(1, 1), nodes=[(1, 0.25)])
    port = next(r for r in sync.work.fabric.resources if r.name == "n-1/nic0 in")
    assert port.busy_s == pytest.approx(0.25, rel=1e-3)
