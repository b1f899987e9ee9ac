"""What policies cost: seconds by hand, bytes against need, and the same for a plan."""

from __future__ import annotations

import pytest
from policy_cases import NIC_GBPS, group_of, nodes_of

from wsync.plan import Planner
from wsync.plan.nodes import find_nodes
from wsync.sim.policies import Moves, checkpoint_engine, m2n_node_aware, rank0_broadcast, round_robin
from wsync.sim.policies.cost import cost_of, cost_of_plan, least_entering_bytes
from wsync.sim.policies.moves import as_packed
from wsync.testing.generators import dense_tensors, fsdp_source, tp_sink

GB = 10**9
BUCKET = 4 << 20


def test_round_robin_takes_as_long_as_the_busiest_port():
    nodes = nodes_of(["t0"], ["e0", "e1", "e2", "e3"])
    groups = [group_of([0], range(4), 10 * GB)]
    cost = cost_of(round_robin(groups, nodes), groups, nodes, BUCKET)
    # Four copies leave by the NIC of equal position, one after the other.
    assert cost.time_s == pytest.approx(4 * 10 / NIC_GBPS, rel=0.01)
    assert "t0 out" in cost.busiest
    assert cost.delivered_ratio == cost.entering_ratio == 1.0


def test_a_chain_takes_one_copy_through_every_port():
    nodes = nodes_of(["t0"], ["e0", "e1", "e2", "e3"])
    groups = [group_of([0], range(4), 10 * GB)]
    cost = cost_of(m2n_node_aware(groups, nodes), groups, nodes, BUCKET)
    assert cost.time_s == pytest.approx(10 / NIC_GBPS, rel=0.01)


def test_gathering_counts_where_it_binds():
    nodes = nodes_of(["t0", "t1", "t2", "t3", "t4"], ["e0"])
    groups = [group_of([r], [0], 10 * GB) for r in range(5)]
    moves = rank0_broadcast(groups, nodes)
    cost = cost_of(moves, groups, nodes, BUCKET)
    assert moves.moved_bytes == moves.delivered_bytes + 40 * GB
    # Rank 0 takes 40 GB and sends 50 GB, at the same time.
    assert cost.time_s == pytest.approx(50 / NIC_GBPS, rel=0.01)
    assert cost.entering_ratio == 1.0


def test_bytes_that_nobody_needs_count_as_delivered_and_as_entering():
    nodes = nodes_of(["t0"], ["e0", "e0", "e1", "e1"])
    groups = [group_of([0], [0], GB), group_of([0], [2], GB, class_idx=1)]
    cost = cost_of(checkpoint_engine(groups, nodes), groups, nodes, BUCKET)
    assert cost.delivered_ratio == 4.0
    assert cost.entering_ratio == 2.0


def test_copying_from_host_memory_counts_where_it_is_slowest():
    nodes = nodes_of(["t0"], ["e0"])
    groups = [group_of([0], [0], GB)]
    fast = cost_of(checkpoint_engine(groups, nodes), groups, nodes, BUCKET)
    slow = Moves(checkpoint_engine(groups, nodes).routing, host_bytes={0: 100 * GB})
    assert fast.time_s < 0.03
    assert cost_of(slow, groups, nodes, BUCKET).time_s == pytest.approx(100 / 55.0)
    assert "from its host" in cost_of(slow, groups, nodes, BUCKET).busiest


def test_two_copies_into_one_node_enter_twice():
    nodes = nodes_of(["t0", "t1"], ["e0", "e0"])
    groups = [group_of([0, 1], [0, 1], GB)]
    assert cost_of(round_robin(groups, nodes), groups, nodes, BUCKET).entering_ratio == 2.0
    assert least_entering_bytes(groups, nodes) == GB


def test_what_a_node_holds_need_not_enter_it():
    nodes = nodes_of(["a", "b"], ["a", "b"])
    groups = [group_of([0], [0, 1], GB)]
    assert least_entering_bytes(groups, nodes) == GB
    assert cost_of(m2n_node_aware(groups, nodes), groups, nodes, BUCKET).entering_ratio == 1.0


def test_only_who_keeps_shards_waits_for_amaxes():
    nodes = nodes_of(["t0", "t1"], ["e0"])
    groups = [group_of([0], [0], GB), group_of([1], [0], GB)]
    for policy, waits in ((round_robin, True), (rank0_broadcast, False)):
        moves = policy(groups, nodes)
        more = cost_of(moves, groups, nodes, BUCKET, 10**8).time_s - cost_of(moves, groups, nodes, BUCKET).time_s
        assert (more > 1e-3) == waits


def test_packed_pieces_are_whole_multiples():
    (group,) = as_packed([group_of([0], [0], 300, 7)])
    assert group.lots[0].nbytes == 512
    assert group.nbytes == 7 * 512


def test_a_plan_costs_what_it_says_and_delivers_what_is_needed():
    tensors = dense_tensors(1, 256, 4, 2, 64, 512, 1024)
    source = fsdp_source(tensors, ["t0", "t1"])
    planner = Planner(source)
    sink = tp_sink(tensors, [["e0", "e0"], ["e1", "e1"]], "fp8_block128")
    plan = planner.plan(sink)
    groups, nodes = planner.demand(sink), find_nodes(source, sink, None)
    cost = cost_of_plan(plan, groups, nodes)
    assert cost.time_s == plan.time_s
    assert cost.delivered_ratio == pytest.approx(1.0)
    assert cost.entering_ratio == pytest.approx(1.0)


def test_demand_has_every_byte_that_the_plan_needs_in_lots():
    tensors = dense_tensors(1, 256, 4, 2, 64, 512, 1024)
    planner = Planner(fsdp_source(tensors, ["t0", "t0", "t1", "t1"], replicas=2))
    sink = tp_sink(tensors, [["e0", "e0"], ["e1", "e1"]], "fp8_block128")
    groups = planner.demand(sink)
    assert sum(g.nbytes * len(g.sinks) for g in groups) == planner.plan(sink).needed_bytes
    assert all(g.nbytes == sum(lot.nbytes * lot.num_members for lot in g.lots) for g in groups)
