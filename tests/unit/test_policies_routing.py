"""What peers' policies send to whom, on demand groups small enough to follow by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import entering, group_of, nodes_of, received, sent

from wsync.sim.policies import (
    POLICIES,
    Gather,
    alpa_broadcast,
    alpa_send_recv,
    checkpoint_engine,
    m2n_node_aware,
    m2n_uniform,
    rank0_broadcast,
    round_robin,
    stage_broadcast,
)
from wsync.sim.policies.alpa import least_loaded
from wsync.sim.policies.moves import needed_bytes

BROADCASTS = [rank0_broadcast, stage_broadcast, checkpoint_engine]


@pytest.mark.parametrize("name", POLICIES)
def test_every_sink_receives_what_it_needs_exactly_once(name):
    nodes = nodes_of(["t0", "t0", "t1", "t1"], ["e0", "e0", "e1", "e1", "e2", "e2"])
    groups = [
        group_of([0, 1, 2, 3], [0, 2, 4], 30, 7),
        group_of([2], [1, 3, 5], 11, 3, class_idx=1),
        group_of([0, 3], range(6), 5, 1, class_idx=2),
    ]
    moves = POLICIES[name](groups, nodes)
    assert len(moves.routing.routes) == len(groups)
    for i, group in enumerate(groups):
        found = received(moves, i)
        assert {s: found.get(s, 0) for s in group.sinks} == dict.fromkeys(group.sinks, group.nbytes)
        assert sorted(s for r in moves.routing.routes[i] for s in r.sinks) == list(group.sinks)
    if POLICIES[name] not in BROADCASTS:
        assert moves.delivered_bytes == needed_bytes(groups)
        assert not moves.gathers


@pytest.mark.parametrize("policy", BROADCASTS)
def test_broadcasts_deliver_every_byte_to_every_rank(policy):
    nodes = nodes_of(["t0", "t1"], ["e0", "e0", "e1", "e1"])
    groups = [group_of([0], [0, 2], 40), group_of([1], [1, 3], 60, class_idx=1)]
    moves = policy(groups, nodes)
    assert moves.delivered_bytes == 4 * 100
    assert needed_bytes(groups) == 2 * 100
    assert received(moves, 0) == dict.fromkeys(range(4), 40)


def test_rank_0_gathers_what_it_does_not_hold_and_sends_all_of_it_once():
    nodes = nodes_of(["t0", "t0", "t1"], ["e0", "e0", "e1"])
    groups = [group_of([0, 1], [0], 10), group_of([1, 2], [1], 20), group_of([2], [2], 40)]
    moves = rank0_broadcast(groups, nodes)
    assert moves.gathers == (Gather(1, 0, 20), Gather(2, 0, 40))
    assert sent(moves) == {(0, 0): 70}
    assert entering(moves, nodes) == {"e0": 70, "e1": 70}


def test_each_stage_gathers_on_its_own_first_rank():
    nodes = nodes_of(["t0", "t0", "t1", "t1"], ["e0"])
    groups = [group_of([0], [0], 10), group_of([1], [0], 10), group_of([2], [0], 7, class_idx=1)]
    groups.append(group_of([3], [0], 7, class_idx=1))
    moves = stage_broadcast(groups, nodes)
    assert moves.gathers == (Gather(1, 0, 10), Gather(3, 2, 7))
    assert sent(moves) == {(0, 0): 20, (2, 0): 14}


def test_checkpoint_engine_spreads_the_checkpoint_evenly_over_host_memories():
    nodes = nodes_of(["t0", "t1"], ["e0", "e0", "e1", "e1"])
    moves = checkpoint_engine([group_of([0, 1], [0], 30), group_of([0, 1], [2], 70)], nodes)
    assert moves.host_bytes == dict.fromkeys(range(4), 25)
    assert entering(moves, nodes) == {"e0": 100, "e1": 100}


def test_round_robin_pairs_copies_and_shares_nothing_inside_a_node():
    nodes = nodes_of(["t0", "t1"], ["e0", "e0", "e1"])
    moves = round_robin([group_of([0, 1], [0, 1, 2])], nodes)
    assert sent(moves) == {(0, 0): 100, (1, 1): 100, (0, 2): 100}
    assert entering(moves, nodes) == {"e0": 200, "e1": 100}


def test_m2n_uniform_splits_by_copies_and_sends_twice_to_a_node_that_two_ranges_share():
    nodes = nodes_of(["t0", "t1"], ["e0", "e0", "e0", "e0"], gpus=4)
    moves = m2n_uniform([group_of([0, 1], [0, 1, 2, 3])], nodes)
    assert sent(moves) == {(0, 0): 100, (1, 2): 100}
    assert entering(moves, nodes) == {"e0": 200}


def test_m2n_uniform_leaves_surplus_copies_of_the_trainer_idle():
    nodes = nodes_of(["t0"] * 5, ["e0", "e1"], gpus=5)
    moves = m2n_uniform([group_of(range(5), [0, 1])], nodes)
    assert sent(moves) == {(0, 0): 100, (3, 1): 100}  # five copies for two: parts of three and two, the first of each


def test_m2n_node_aware_sends_each_domain_one_copy():
    nodes = nodes_of(["t0", "t1"], ["e0", "e0", "e0", "e0", "e1", "e1"], gpus=4)
    moves = m2n_node_aware([group_of([0, 1], range(6))], nodes)
    assert sent(moves) == {(0, 0): 100, (1, 4): 100}
    assert entering(moves, nodes) == {"e0": 100, "e1": 100}


def test_m2n_node_aware_rings_over_the_domains_of_a_range():
    nodes = nodes_of(["t0", "t1"], ["e0", "e1", "e2"])
    moves = m2n_node_aware([group_of([0, 1], range(3))], nodes)
    assert sent(moves) == {(0, 0): 100, (1, 2): 100}
    assert entering(moves, nodes) == {"e0": 100, "e1": 100, "e2": 100}


def test_alpa_takes_the_owner_that_has_sent_least():
    nodes = nodes_of(["t0", "t1"], ["e0", "e1"])
    groups = [group_of([0], [0, 1], 100), group_of([0, 1], [0], 30, 10, class_idx=1)]
    assert sum(n for (src, _), n in sent(alpa_send_recv(groups, nodes)).items() if src == 1) == 240
    assert sent(alpa_broadcast(groups, nodes)) == {(0, 0): 100 + 90, (1, 0): 210}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 40))
def test_counting_the_least_loaded_at_once_is_choosing_one_by_one(loads, nbytes, num_items):
    now = list(loads)
    picks = [0] * len(loads)
    for _ in range(num_items):
        i = min(range(len(now)), key=lambda i: (now[i], i))
        now[i] += nbytes
        picks[i] += 1
    assert least_loaded(loads, nbytes, num_items) == picks


def test_a_policy_says_the_same_twice():
    nodes = nodes_of(["t0", "t0", "t1"], ["e0", "e1", "e1"])
    groups = [group_of([0, 1, 2], [0, 2], 13, 5), group_of([1], [1], 4)]
    for policy in POLICIES.values():
        assert policy(groups, nodes) == policy(groups, nodes)
