"""Routing of random demand on random clusters: everybody is reached, once, by somebody who has the bytes."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from route_cases import (
    MIB,
    check_routing,
    cluster_of,
    cpu_group,
    gpu_group,
    group,
    hosts,
    plan,
)

from wsync.plan.route import route
from wsync.plan.types import PlanOptions
from wsync.spec import Link

shapes = st.sampled_from(
    [
        lambda name, count: gpu_group(name, count, 4, 25.0),
        lambda name, count: gpu_group(name, count, 4, 25.0, nvlink_domain=0),
        lambda name, count: gpu_group(name, count, 4, 25.0, nvlink_domain=2),
        lambda name, count: gpu_group(name, count, 4, 100.0, num_nics=1),
        lambda name, count: gpu_group(name, count, 4, 50.0, num_nics=2),
        lambda name, count: gpu_group(name, count, 2, 50.0, nvlink_domain=4),
        lambda name, count: cpu_group(name, count, 12.5),
    ]
)


@st.composite
def jobs(draw):
    parts = [draw(shapes)(name, draw(st.integers(1, 4))) for name in ("a", "b", "c")[: draw(st.integers(1, 3))]]
    links = []
    if len(parts) > 1 and draw(st.booleans()):
        links.append(Link("wan", (parts[0].name,), tuple(p.name for p in parts[1:]), 5.0))
    places = [h for p in parts for h in hosts(p)]
    sources = draw(st.lists(st.sampled_from(places), min_size=1, max_size=8))
    sinks = draw(st.lists(st.sampled_from(places), min_size=1, max_size=12))
    found = {}
    for _ in range(draw(st.integers(1, 12))):
        held = tuple(sorted(draw(st.sets(st.integers(0, len(sources) - 1), min_size=1))))
        need = tuple(sorted(draw(st.sets(st.integers(0, len(sinks) - 1), min_size=1))))
        stage = draw(st.integers(0, 1))
        nbytes = draw(st.sampled_from([1, 1000, MIB, 7 * MIB + 13, 900 * MIB]))
        found[(held, need, stage)] = group(held, need, nbytes, stage)
    return list(found.values()), sources, sinks, cluster_of(*parts, links=links, alpha_s=1e-6), MIB


@st.composite
def crowded(draw):
    """One node of several NVLink domains, of which few ranks load both NVLink and PCIe."""
    nvlink, pcie, nic = draw(st.sampled_from([(50.0, 60.0, 1.0), (300.0, 64.0, 25.0), (64.0, 64.0, 64.0)]))
    size = draw(st.sampled_from([0, 1, 2, 3, 4]))
    fields = {"nvlink_domain": size, "nvlink_gbps": nvlink if size else None, "pcie_gbps": pcie}
    a = gpu_group("a", draw(st.integers(1, 2)), 4, nic, **fields)
    sources = hosts(a, 4 * draw(st.integers(1, 2)))
    sinks = hosts(a, 4 * draw(st.integers(1, 2)))
    # Whole GB at the rates of both ways.
    sizes = st.sampled_from([round(nvlink * 1e9), round(pcie * 1e9), round(nvlink * 1e9) + round(pcie * 1e9)])
    found = {}
    for _ in range(draw(st.integers(1, 6))):
        held = (draw(st.integers(0, 4)) % len(sources),)
        need = tuple(sorted(draw(st.sets(st.integers(0, 4).map(lambda s: s % len(sinks)), min_size=1, max_size=2))))
        found[(held, need)] = group(held, need, draw(sizes))
    return list(found.values()), sources, sinks, cluster_of(a), 64 * MIB


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(jobs(), crowded()), st.booleans())
def test_every_sink_is_reached_once_and_no_plan_beats_its_bounds(job, relay):
    groups, sources, sinks, cluster, bucket_bytes = job
    nodes, routing, times, bounds = plan(groups, sources, sinks, cluster, bucket_bytes, relay)
    check_routing(groups, routing, nodes, relay)
    if bounds:
        assert times.time_s >= bounds[0].seconds * (1 - 1e-9)
    assert route(groups, nodes, bucket_bytes, PlanOptions(bucket_bytes, relay=relay)) == routing


@pytest.mark.parametrize("relay", [True, False])
def test_an_empty_demand_has_an_empty_routing(relay):
    a = cpu_group("a", 1)
    _, routing, times, bounds = plan([], hosts(a), hosts(a), cluster_of(a), MIB, relay)
    assert (routing.trees, routing.routes, times.time_s, bounds) == ([], [], 0.0, ())
