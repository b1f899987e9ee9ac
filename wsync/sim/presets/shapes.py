"""Clusters that break planners: few senders for many receivers, a thin link, and one that is done in a moment."""

from __future__ import annotations

from wsync.plan.types import PlanOptions
from wsync.sim.presets.machines import RDMA_ALPHA_S, h100
from wsync.sim.presets.preset import Preset
from wsync.spec.cluster import Cluster, Link

WAN_GBPS = 12.5
"""100 Gb/s."""
WAN_ALPHA_S = 50e-6
"""Messages that cross a WAN are pipelined: this is what each costs, not how long light takes."""

SHAPES: tuple[Preset, ...] = (
    Preset(
        "one-to-64",
        "one trainer node to 64 engine nodes: Qwen3-32B in fp8",
        "Qwen3-32B",
        "fsdp=8",
        "tp=8,replicas=64",
        "fp8_block128",
        Cluster((h100("trainer", 1), h100("engine", 64)), alpha_s=RDMA_ALPHA_S),
        "trainer",
        "engine",
        (
            "FSDP2 on one node of H100; each engine node is a replica; without relays the trainer sends all 64 times",
            "buckets of 2 MiB: every port is busy all the time, so what the last round of 64 trees takes is lost",
        ),
        options=PlanOptions(bucket_bytes=2 << 20),
    ),
    Preset(
        "wan-100g",
        "two clusters behind one link of 100 Gb/s: Qwen3-30B-A3B in fp8, 2 nodes to 8",
        "Qwen3-30B-A3B",
        "fsdp=16",
        "tp=4,ep=8,replicas=8",
        "fp8_block128",
        Cluster(
            (h100("trainer", 2), h100("engine", 8)),
            (Link("wan", ("trainer",), ("engine",), WAN_GBPS),),
            alpha_s=WAN_ALPHA_S,
        ),
        "trainer",
        "engine",
        ("every byte should cross the link once, and be relayed behind it", "alpha is 50 us on every hop"),
    ),
    Preset(
        "tiny",
        "Qwen3-0.6B in fp8 from one node to two: done in a moment, for tests",
        "Qwen3-0.6B",
        "fsdp=8",
        "tp=8,replicas=2",
        "fp8_block128",
        Cluster((h100("trainer", 1), h100("engine", 2)), alpha_s=1e-6),
        "trainer",
        "engine",
        ("alpha is 1 us and buckets have 512 KiB: a model so small is little more than alpha",),
        options=PlanOptions(bucket_bytes=512 << 10),
    ),
)
