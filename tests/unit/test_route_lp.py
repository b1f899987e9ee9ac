"""Routing and cuts against the exact optimum of a linear program."""

import pytest
from route_cases import MIB, check_routing, plan, random_case, random_gpu_case, random_zones_case
from route_lp import optimum_of_gpus_s, optimum_s

BATCH = 40
INSIDE = ("egress of trainer rank", "install on", "host memory")
"""Cuts that do not count NICs and links."""


@pytest.mark.parametrize("relay", [True, False])
@pytest.mark.parametrize("batch", range(5))
def test_routing_is_within_five_percent_of_the_optimum_and_cuts_are_not_above_it(batch, relay):
    count = 0
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        groups, sources, sinks, cluster = random_case(seed)
        nodes, routing, times, bounds = plan(groups, sources, sinks, cluster, 4 * MIB, relay)
        check_routing(groups, routing, nodes, relay)
        optimum = optimum_s(groups, nodes, relay)
        busiest = max((x.seconds for x in times.loads if x.name.startswith(("nic", "link"))), default=0.0)
        assert busiest >= optimum * (1 - 1e-6), seed
        assert busiest <= optimum * 1.05, seed
        wire = [b.seconds for b in bounds if not b.name.startswith(INSIDE)]
        assert max(wire, default=0.0) <= optimum * (1 + 1e-6), seed
        count += optimum > 0
    assert count > BATCH // 2


@pytest.mark.parametrize("batch", range(5))
def test_with_relays_the_largest_cut_is_the_optimum_of_small_clusters(batch):
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        groups, sources, sinks, cluster = random_case(seed)
        nodes, _, _, bounds = plan(groups, sources, sinks, cluster)
        optimum = optimum_s(groups, nodes)
        if optimum > 0:
            assert bounds[0].seconds == pytest.approx(optimum, rel=1e-6), seed


@pytest.mark.parametrize("relay", [True, False])
@pytest.mark.parametrize("kind", ["leaf", "site", "pair"])
def test_between_several_zones_routing_is_as_close_to_the_optimum(kind, relay):
    bounded = 0
    for seed in range(BATCH):
        groups, sources, sinks, cluster = random_zones_case(seed, kind)
        nodes, routing, times, bounds = plan(groups, sources, sinks, cluster, 4 * MIB, relay)
        check_routing(groups, routing, nodes, relay)
        optimum = optimum_s(groups, nodes, relay)
        busiest = max((x.seconds for x in times.loads if x.name.startswith(("nic", "link"))), default=0.0)
        assert optimum * (1 - 1e-6) <= busiest <= optimum * 1.05, seed
        wire = [b.seconds for b in bounds if not b.name.startswith(INSIDE)]
        assert max(wire, default=0.0) <= optimum * (1 + 1e-6), seed
        bounded += max(wire, default=0.0) >= optimum * (1 - 1e-6)
    assert bounded >= (0.9 if relay else 0.5) * BATCH


@pytest.mark.parametrize("batch", range(4))
def test_between_gpus_no_cut_is_above_the_optimum_and_no_plan_below_it(batch):
    binding = set()
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        groups, sources, sinks, cluster = random_gpu_case(seed)
        nodes, _, times, bounds = plan(groups, sources, sinks, cluster, 256 * MIB)
        optimum = optimum_of_gpus_s(groups, nodes)
        assert times.busiest_s >= optimum * (1 - 1e-6), seed
        if bounds:
            assert bounds[0].seconds <= optimum * (1 + 1e-6), (seed, bounds[0])
            binding.add(bounds[0].name.split(" of ")[0].split(" on ")[0])
    assert {"install", "egress"} <= binding
