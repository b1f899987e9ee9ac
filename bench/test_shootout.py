"""wsync against the policies of its peers: none is faster on any preset. Run with ``pytest bench/test_shootout.py``.

The time of wsync's row is that of planning from manifests; those of policies are their routing alone.
"""

from __future__ import annotations

import pytest

from wsync.bench.peers import small_case
from wsync.bench.shootout import run_peers, run_preset
from wsync.bench.shootout_result import WSYNC
from wsync.plan import Planner
from wsync.plan.nodes import find_nodes
from wsync.sim.policies import POLICIES
from wsync.sim.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_no_policy_is_faster_than_the_plan(name):
    result = run_preset(name)
    ours = result.row(WSYNC)
    assert not result.beaten_by, (result.beaten_by, [(r.policy, r.score) for r in result.rows])
    assert ours.score <= 1.05
    assert all(ours.entering_ratio <= row.entering_ratio * (1 + 1e-9) for row in result.rows)


def test_no_planner_of_another_system_is_faster():
    ours, *others = run_peers(small_case())
    for other in others:
        if other.time_s is None:
            pytest.skip(f"{other.planner} is not installed: {', '.join(other.missing)}")
        assert ours.time_s <= other.time_s * (1 + 1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_routing_kimi_k2_as_a_peer_does(benchmark, name):
    source, sink, cluster, options = PRESETS["perplexity-kimi-k2-k4"].build()
    groups = Planner(source, cluster, options).demand(sink)
    nodes = find_nodes(source, sink, cluster)
    benchmark.pedantic(POLICIES[name], (groups, nodes), rounds=1)


def test_planning_kimi_k2(benchmark):
    source, sink, cluster, options = PRESETS["perplexity-kimi-k2-k4"].build()
    benchmark.pedantic(lambda: Planner(source, cluster, options).plan(sink), rounds=2)
