"""Other systems' own planners on the small case, where they are installed, and the policies that follow them."""

from __future__ import annotations

import pytest
from policy_cases import group_of, nodes_of, sent

from wsync.bench.peers import PEERS, Peer, PeerPlan, missing_of, small_case
from wsync.plan.nodes import find_nodes
from wsync.sim.policies import round_robin


@pytest.fixture(scope="module")
def case():
    return small_case(2)


def demand_of(case):
    """The case's demand groups, from its boxes alone."""
    groups = {}
    for i, tensor in case.tensors:
        rows = {b for rank in range(len(case.source.ranks)) for b in case.source.shards[i][rank]}
        for held in rows:
            holders = [r for r in range(len(case.source.ranks)) if held in case.source.shards[i][r]]
            needs = {}
            for sink_idx, boxes in enumerate(case.sink_boxes()):
                common = held.intersect(boxes[tensor.name])
                if common is not None:
                    needs.setdefault(common, []).append(sink_idx)
            for box, sinks in needs.items():
                key = (tuple(holders), tuple(sinks))
                groups[key] = groups.get(key, 0) + 2 * box.num_elements
    return [group_of(holders, sinks, nbytes) for (holders, sinks), nbytes in groups.items()]


def answer_of(name, case):
    peer = next(p for p in PEERS if p.name.startswith(name))
    missing = missing_of(peer)
    if missing:
        pytest.skip(f"{peer.name} needs {', '.join(missing)}: pip install 'wsync-rl[peers]'")
    return peer.plan(case)()


def received_bytes(answer):
    out = {}
    for (_, sink_idx), nbytes in answer.sent.items():
        out[sink_idx] = out.get(sink_idx, 0) + nbytes
    return out


@pytest.mark.parametrize("name", ["Mooncake", "awex"])
def test_a_peers_planner_delivers_what_every_rank_needs(name, case):
    needed = {i: sum(2 * b.num_elements for b in boxes.values()) for i, boxes in enumerate(case.sink_boxes())}
    assert received_bytes(answer_of(name, case)) == needed


def test_awex_is_the_round_robin_policy(case):
    nodes = find_nodes(case.source, case.sink, case.cluster)
    assert sent(round_robin(demand_of(case), nodes)) == dict(answer_of("awex", case).sent)


def test_mooncake_feeds_each_engine_replica_from_one_copy(case):
    for src_rank, sink_idx in answer_of("Mooncake", case).sent:
        assert src_rank // case.copy_size == (sink_idx // case.replica_size) % case.num_copies


def test_a_planner_that_is_not_installed_is_named_with_what_it_lacks():
    peer = Peer("none", "none", ("wsync", "wsync_no_such_module", "wsync_no.such.module"), lambda case: None)
    assert missing_of(peer) == ["wsync_no_such_module", "wsync_no.such.module"]


def test_an_answer_becomes_moves_that_deliver_the_same_bytes():
    nodes = nodes_of(["t0", "t1"], ["e0", "e1"])
    answer = PeerPlan({(0, 0): 5, (1, 0): 7, (1, 1): 9}, 3)
    moves = answer.moves(nodes)
    assert sent(moves) == dict(answer.sent)
    assert moves.delivered_bytes == 21
