"""Clusters and layouts like those that peers have published times for: no plan is over 5 % above its bound."""

import pytest
from msgspec.structs import replace
from route_cases import (
    MIB,
    check_routing,
    cluster_of,
    fsdp,
    gpu_group,
    hosts,
    megatron,
    moe_groups,
    plan,
)

from wsync.spec import Link, Nic

GB = 10**9
ALPHA_S = 5e-6


def apart(trainers, engines, groups, **fields):
    a, b = gpu_group("a", trainers, **fields), gpu_group("b", engines, **fields)
    return groups, hosts(a), hosts(b), cluster_of(a, b, alpha_s=ALPHA_S)


def kimi(holders, replicas, size):
    return moe_groups(holders, replicas, size, 20 * GB, 1000 * GB, 3 * GB)


def colocated():
    a = gpu_group("a", 32)
    return kimi(fsdp(256), 16, 16), hosts(a), hosts(a), cluster_of(a, alpha_s=ALPHA_S)


def gb200():
    fields = {"num_gpus": 4, "nvlink_domain": 72, "nvlink_gbps": 900.0}
    groups = moe_groups(megatron(128, 8, 16), 1, 128, 20 * GB, 1320 * GB, 2 * GB, tp=4)
    return apart(32, 32, groups, **fields)


def wan():
    a, b = gpu_group("a", 2), gpu_group("b", 8)
    link = Link("wan", ("a",), ("b",), 12.5)
    groups = moe_groups(fsdp(16), 8, 8, 2 * GB, 28 * GB, GB)
    return groups, hosts(a), hosts(b), cluster_of(a, b, links=[link], alpha_s=50e-6)


def uneven():
    a, b, c = gpu_group("a", 2), gpu_group("b", 1), gpu_group("c", 2, num_nics=4)
    groups = moe_groups(fsdp(16), 3, 8, 60 * GB, 100 * GB, GB)
    return groups, hosts(a), [*hosts(b), *hosts(c)], cluster_of(a, b, c, alpha_s=ALPHA_S)


def one_nic():
    a, b = gpu_group("a", 2), gpu_group("b", 4)
    shared = (Nic(50.0),)
    a, b = (replace(g, nics=shared, nvlink_domain=0, nvlink_gbps=None) for g in (a, b))
    return moe_groups(fsdp(16), 4, 8, 60 * GB, 20 * GB, GB), hosts(a), hosts(b), cluster_of(a, b, alpha_s=ALPHA_S)


CASES = {
    "Kimi-K2, FSDP, replicas of 2 nodes": lambda: apart(32, 16, kimi(fsdp(256), 8, 16)),
    "Kimi-K2, FSDP, replicas of 4 nodes": lambda: apart(32, 16, kimi(fsdp(256), 4, 32)),
    "Kimi-K2, Megatron, replicas of 2 nodes": lambda: apart(32, 16, kimi(megatron(256, 8, 32), 8, 16)),
    "Kimi-K2, 32 and 32 nodes": lambda: apart(32, 32, kimi(megatron(256, 8, 32), 8, 32)),
    "DeepSeek-V3, 256 and 256": lambda: apart(
        32, 32, moe_groups(megatron(256, 8, 32), 8, 32, 20 * GB, 1300 * GB, 2 * GB)
    ),
    "Qwen3-235B, 8 and 8": lambda: apart(1, 1, moe_groups(fsdp(8), 1, 8, 460 * GB, 0, 10 * GB)),
    "one node to 64": lambda: apart(1, 64, moe_groups(fsdp(8), 64, 8, 34 * GB, 0, GB)),
    "colocated": colocated,
    "GB200": gb200,
    "wan": wan,
    "uneven NICs": uneven,
    "PCIe and one NIC": one_nic,
}


@pytest.mark.parametrize("name", CASES)
def test_plans_are_within_five_percent_of_their_bound(name):
    groups, sources, sinks, cluster = CASES[name]()
    bucket_bytes = (16 if "one node" not in name else 4) * MIB
    nodes, routing, times, bounds = plan(groups, sources, sinks, cluster, bucket_bytes)
    check_routing(groups, routing, nodes)
    assert times.time_s <= 1.05 * bounds[0].seconds, (times.loads[:3], bounds[:3])
