"""Whether weights and staged buckets fit into the memory of each GPU. The simulated pipeline itself ignores memory."""

from __future__ import annotations

import math
from collections import defaultdict

from wsync.plan.nodes import Nodes
from wsync.plan.plans import Plan
from wsync.sim.options import SimOptions
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SinkManifest, SourceManifest, StorageSpec


def memory_notes(
    plan: Plan, source: SourceManifest, sink: SinkManifest, nodes: Nodes, options: SimOptions
) -> tuple[str, ...]:
    """A line that names the GPU that lacks most, if any does and the memory of GPUs is known."""
    if options.gpu_memory_gb is None:
        return ()
    needed = needed_bytes(plan, source, sink, nodes, options)
    limit = options.gpu_memory_gb * 1e9
    short = {key: nbytes for key, nbytes in needed.items() if nbytes > limit}
    if not short:
        return ()
    (node, gpu), most = max(short.items(), key=lambda item: (item[1], item[0]))
    return (
        f"{len(short)} of {len(needed)} GPUs lack memory for weights and staged buckets: GPU {gpu} of node "
        f"{nodes.names[node]} needs {most / 1e9:,.1f} GB and has {options.gpu_memory_gb:g}",
    )


def needed_bytes(
    plan: Plan, source: SourceManifest, sink: SinkManifest, nodes: Nodes, options: SimOptions
) -> dict[tuple[int, int], int]:
    """Bytes of weights and staged buckets on each GPU, as (node, GPU); ranks that share a GPU add up."""
    needed: dict[tuple[int, int], int] = defaultdict(int)
    weights = source_bytes(source)
    for rank, lane in enumerate(nodes.sources):
        if lane.gpu >= 0:
            held = 0 if lane.offloaded else weights[rank]
            needed[lane.node, lane.gpu] += held + plan.source_memory_bytes(rank)
    mode = "paused" if options.install == "in_place" else "staged"
    live = sink_bytes(sink)
    for sink_idx, lane in enumerate(nodes.sinks):
        if lane.gpu >= 0:
            staged = 0 if lane.in_host else plan.sink_memory_bytes(sink_idx, mode)
            needed[lane.node, lane.gpu] += live[sink_idx] + staged
    return dict(needed)


def source_bytes(source: SourceManifest) -> list[int]:
    """Bytes of weights on each trainer rank. Tensors that share their shards are counted together."""
    per_shards: dict[int, int] = defaultdict(int)
    shards_of = {}
    for tensor, shards in zip(source.tensors, source.shards, strict=True):
        if tensor.alias_of is None:
            shards_of[id(shards)] = shards
            per_shards[id(shards)] += itemsize(tensor.dtype)
    held = [0] * len(source.ranks)
    for key, shards in shards_of.items():
        for rank, boxes in enumerate(shards):
            held[rank] += per_shards[key] * sum(math.prod(box.shape) for box in boxes)
    return held


def sink_bytes(sink: SinkManifest) -> list[int]:
    """Bytes of live memory on each engine rank. Ranks of equal replicas share their storages."""
    known: dict[int, int] = {}
    for rank in sink.ranks:
        if id(rank.storages) not in known:
            known[id(rank.storages)] = _storage_bytes(rank.storages)
    return [known[id(rank.storages)] for rank in sink.ranks]


def _storage_bytes(storages: tuple[StorageSpec, ...]) -> int:
    return sum(s.num_elements * itemsize(s.dtype) for s in storages)
