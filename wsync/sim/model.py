"""From a plan to work: the only part of the simulator that knows what plans are made of."""

from __future__ import annotations

import math

from wsync.errors import PlanMismatchError
from wsync.plan.flow_sizes import scanned_bytes
from wsync.plan.flows import Flow, Tree
from wsync.plan.plans import Plan, PlanClass
from wsync.plan.timing import amax_s, scan_s
from wsync.plan.types import MODE_SCALED, SOURCE
from wsync.sim.fabric import Fabric
from wsync.sim.work import Road, Stream, Work
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SinkManifest, SourceManifest
from wsync.spec.recipes import get_recipe


def build_work(plan: Plan, source: SourceManifest, sink: SinkManifest, fabric: Fabric) -> Work:
    """Everything that a plan does, on the resources of a cluster.

    Raises:
        PlanMismatchError: the plan is for other ranks.
    """
    ranks = (len(source.ranks), len(sink.ranks))
    if (plan.num_sources, plan.num_sinks) != ranks:
        raise PlanMismatchError(
            f"the plan is for {plan.num_sources} trainer ranks and {plan.num_sinks} engine ranks, the manifests have "
            f"{ranks[0]} and {ranks[1]}"
        )
    reads = [_reads(cls, source) for cls in plan.classes]
    roads: dict[tuple[int, int], Road] = {}
    streams = []
    for flow in plan.flows:
        if flow.nbytes:
            key = (flow.src_rank, flow.tree_idx)
            if key not in roads:
                roads[key] = _road(fabric, flow.src_rank, plan.trees[flow.tree_idx])
            streams.append(_stream(plan, flow, roads[key], reads))
    replicas = [rank.replica for rank in sink.ranks]
    return Work(fabric, replicas, streams, amax_seconds(plan, source, fabric))


def _road(fabric: Fabric, rank: int, tree: Tree) -> Road:
    slot_of = {SOURCE: 0}
    for _, sink_idx in tree.hops:
        slot_of[sink_idx] = len(slot_of)
    hops = [(slot_of[a], slot_of[b], rail) for (a, b), rail in zip(tree.hops, tree.rails, strict=True)]
    return Road(fabric, fabric.nodes.sources[rank], hops, list(slot_of), fabric.nodes.sinks)


def _stream(plan: Plan, flow: Flow, road: Road, reads: list[list[float]]) -> Stream:
    read = packed = weights = 0.0
    waits = False
    for e in flow.entries:
        unit = plan.classes[e.class_idx].units[e.unit_idx]
        read += reads[e.class_idx][e.unit_idx] * (e.end - e.first)
        weights += reads[e.class_idx][e.unit_idx] * (e.end - e.first) if unit.part == 0 else 0.0
        packed += unit.nbytes * (e.end - e.first)
        waits |= unit.mode == MODE_SCALED
    return Stream(
        flow.src_rank,
        flow.stage,
        road,
        flow.wire_bytes,
        plan.num_buckets(flow),
        read / packed if packed else 1.0,
        waits,
        weights / packed if packed else 1.0,
    )


def _reads(cls: PlanClass, source: SourceManifest) -> list[float]:
    """Bytes of trainer memory that packing reads for each unit of one member."""
    per_element = itemsize(source.tensors[cls.members[0]].dtype) * get_recipe(cls.recipe).packed
    return [float(math.prod(unit.box.shape) * per_element if unit.part == 0 else unit.nbytes) for unit in cls.units]


def amax_seconds(plan: Plan, source: SourceManifest, fabric: Fabric) -> float:
    """Seconds until all trainer ranks have the amaxes of blocks that several of them hold parts of.

    Each reads its part of those blocks, then they reduce the vector.
    """
    nodes = fabric.nodes
    read = scanned_bytes(plan.classes, (source.tensors[c.members[0]].dtype for c in plan.classes), len(nodes.sources))
    scanned_s = scan_s(nodes, read)
    for lane, nbytes in zip(nodes.sources, read, strict=True):
        group = nodes.groups[lane.node]
        rate = 2 * group.host_gbps if lane.gpu < 0 else group.hbm_gbps or group.host_gbps
        scanned_s = max(scanned_s, nbytes / (rate * 1e9))
    return scanned_s + amax_s(nodes, plan.amax_elements)
