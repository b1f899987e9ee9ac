"""What ``wsync plan`` says: seconds, bounds, loads, bytes, memory, advice. Versioned for scripts."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Sequence
from functools import partial

import msgspec

from wsync.cli.plan_advice import Facts, advise
from wsync.cli.plan_explain import sink_name
from wsync.plan.cuts import find_bounds
from wsync.plan.flows import DemandGroup
from wsync.plan.nodes import Nodes, find_nodes
from wsync.plan.plans import Plan, PlanClass, PlanUnit, encode_plan, plan_digest
from wsync.plan.replan import Planner
from wsync.plan.timing import Times
from wsync.plan.types import Bound, PlanOptions
from wsync.spec.cluster import Cluster
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SinkManifest, SourceManifest
from wsync.spec.recipes import SCALE_BLOCK

FORMAT_VERSION = 1
_BF16_BYTES = 2


class Side(msgspec.Struct, frozen=True):
    """One side of the job.

    Attributes:
        ranks, nodes: how many.
        replicas: of the engine; 0 for the trainer.
        memory_bytes: that the rank with most of it stages: its buckets; on an engine rank the whole next version.
        ring_bytes: of the engine in mode ``paused``; 0 for the trainer.
        host_ranks: how many on a GPU keep in host memory what is synced.
    """

    ranks: int
    nodes: int
    replicas: int
    memory_bytes: int
    ring_bytes: int = 0
    host_ranks: int = 0


class Load(msgspec.Struct, frozen=True):
    """What one part of the cluster carries: its bytes, the seconds that takes, and their share of the whole time."""

    name: str
    nbytes: int
    seconds: float
    share: float


class Cut(msgspec.Struct, frozen=True):
    """A bound and its name."""

    name: str
    seconds: float


class Size(msgspec.Struct, frozen=True):
    """How big the plan is: classes, demand groups, trees, flows, about how many buckets, and bytes of its encoding."""

    classes: int
    groups: int
    trees: int
    flows: int
    buckets: int
    encoded_bytes: int


class PlanReport(msgspec.Struct, frozen=True):
    """What ``wsync plan --json`` writes.

    Attributes:
        format_version: of this report.
        plan_digest: of the plan.
        time_s: predicted: the busiest part, the filling of pipelines, the exchange of amaxes.
        busiest_s, fill_s, amax_s: these three.
        lower_bound_s, score, binding_cut: what no plan can beat, the time over it, and the cut that gives it.
        bound_without_relays_s, bound_bf16_wire_s: the bound if engine ranks passed nothing on, and if everything
            travelled in bf16.
        bound_on_device_s, time_on_device_s: the bound, and the time of this plan, if no rank on a GPU kept in host
            memory what is synced.
        cuts: the slowest ones.
        loads: of every link, NIC, GPU and memory that carries bytes, the busiest first.
        bucket_bytes: size of a bucket.
        wire_bytes, needed_bytes, delivered_bytes: that trainers pack once, that engine ranks need, that they receive.
        delivered_ratio: received over needed; more than 1 where ranks relay what they do not need.
        amax_elements: of the vector that trainer ranks exchange.
        trainer, engine: the sides.
        advice: what would make it faster.
        size: of the plan.
        plan_wall_s, peak_memory_bytes: what planning took here.
    """

    format_version: int
    plan_digest: str
    time_s: float
    busiest_s: float
    fill_s: float
    amax_s: float
    lower_bound_s: float
    score: float
    binding_cut: str
    bound_without_relays_s: float
    bound_bf16_wire_s: float
    bound_on_device_s: float
    time_on_device_s: float
    cuts: tuple[Cut, ...]
    loads: tuple[Load, ...]
    bucket_bytes: int
    wire_bytes: int
    needed_bytes: int
    delivered_bytes: int
    delivered_ratio: float
    amax_elements: int
    trainer: Side
    engine: Side
    advice: tuple[str, ...]
    size: Size
    plan_wall_s: float
    peak_memory_bytes: int


def plan_and_report(
    source: SourceManifest, sink: SinkManifest, cluster: Cluster | None, options: PlanOptions
) -> tuple[Plan, PlanReport]:
    """Plan, and say everything about it. Raises as `wsync.make_plan`."""
    begin = time.perf_counter()
    planner = Planner(source, cluster, options)
    plan = planner.plan(sink)
    wall_s = time.perf_counter() - begin
    groups, nodes = planner.demand(sink), find_nodes(source, sink, cluster)
    times = planner.times(plan, sink)
    packed_bytes = planner.packed_bytes(sink)
    host_bytes = planner.host_bytes(sink) if nodes.has_offloaded else None
    bounds_of = partial(find_bounds, groups, nodes, sink, host_bytes=host_bytes)
    without = _seconds(bounds_of(relay=False, packed_bytes=packed_bytes))
    bf16 = _seconds(bounds_of(relay=options.relay, nbytes=planner.bf16_bytes(sink)))
    fp8 = bounds_of(relay=options.relay, nbytes=fp8_bytes(plan, groups))
    device_bound_s, device_s = plan.lower_bound_s, plan.time_s
    if nodes.has_offloaded or nodes.has_in_host:
        on_device = nodes.on_device()
        device_bounds = find_bounds(groups, on_device, sink, relay=options.relay, packed_bytes=packed_bytes)
        device_bound_s = _seconds(device_bounds)
        device_s = planner.times(plan, sink, on_device).time_s
    facts = Facts(plan, times, nodes, sink, options, without, fp8, device_bound_s, device_s)
    return plan, PlanReport(
        format_version=FORMAT_VERSION,
        plan_digest=plan_digest(plan),
        time_s=plan.time_s,
        busiest_s=times.busiest_s,
        fill_s=times.fill_s,
        amax_s=times.amax_s,
        lower_bound_s=plan.lower_bound_s,
        score=plan.score,
        binding_cut=plan.binding_cut,
        bound_without_relays_s=without,
        bound_bf16_wire_s=bf16,
        bound_on_device_s=device_bound_s,
        time_on_device_s=device_s,
        cuts=tuple(Cut(b.name, b.seconds) for b in plan.bounds[:10]),
        loads=_loads(times, plan.time_s, sink),
        bucket_bytes=plan.bucket_bytes,
        wire_bytes=plan.wire_bytes,
        needed_bytes=plan.needed_bytes,
        delivered_bytes=plan.delivered_bytes,
        delivered_ratio=plan.delivered_bytes / plan.needed_bytes if plan.needed_bytes else 1.0,
        amax_elements=plan.amax_elements,
        trainer=_trainer(plan, nodes),
        engine=_engine(plan, nodes, sink),
        advice=tuple(advise(facts)),
        size=_size(plan, groups),
        plan_wall_s=wall_s,
        peak_memory_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def fp8_bytes(plan: Plan, groups: Sequence[DemandGroup]) -> list[int]:
    """Bytes of each group if all matrices in 16 bits travelled in ``fp8_block128``."""
    found: dict[tuple[int, int], int] = {}
    out = []
    for group in groups:
        nbytes = 0
        for class_idx, unit_idx, _, num_members in group.lots:
            key = (class_idx, unit_idx)
            if key not in found:
                cls = plan.classes[class_idx]
                found[key] = _fp8_bytes(cls, cls.units[unit_idx])
            nbytes += found[key] * num_members
        out.append(nbytes)
    return out


def _fp8_bytes(cls: PlanClass, unit: PlanUnit) -> int:
    """Of a unit in ``fp8_block128`` if it is a matrix in 16 bits, with its share of the scales."""
    part = cls.parts[unit.part]
    matrix = sum(n > 1 for n in part.shape) > 1
    if cls.recipe != "bf16" or not matrix or itemsize(part.dtype) != _BF16_BYTES:
        return unit.nbytes
    return unit.box.num_elements + 4 * (unit.box.num_elements // SCALE_BLOCK**2)


def _seconds(bounds: Sequence[Bound]) -> float:
    return bounds[0].seconds if bounds else 0.0


def _loads(times: Times, time_s: float, sink: SinkManifest) -> tuple[Load, ...]:
    return tuple(
        Load(readable(x.name, sink), x.nbytes, x.seconds, x.seconds / time_s if time_s else 0.0) for x in times.loads
    )


def readable(name: str, sink: SinkManifest) -> str:
    """A load's name with engine ranks by replica and rank."""
    return re.sub(r"sink (\d+)", lambda m: sink_name(sink.ranks[int(m[1])]), name)


def _trainer(plan: Plan, nodes: Nodes) -> Side:
    memory = max((plan.source_memory_bytes(r) for r in range(plan.num_sources)), default=0)
    host_ranks = sum(lane.offloaded for lane in nodes.sources)
    return Side(plan.num_sources, len(set(nodes.source_node)), 0, memory, host_ranks=host_ranks)


def _engine(plan: Plan, nodes: Nodes, sink: SinkManifest) -> Side:
    every = range(plan.num_sinks)
    staged = max((plan.sink_memory_bytes(s) for s in every), default=0)
    ring = max((plan.sink_memory_bytes(s, "paused") for s in every), default=0)
    replicas = len({rank.replica for rank in sink.ranks})
    host_ranks = sum(lane.in_host for lane in nodes.sinks)
    return Side(plan.num_sinks, len(set(nodes.sink_node)), replicas, staged, ring, host_ranks)


def _size(plan: Plan, groups: Sequence[DemandGroup]) -> Size:
    buckets = sum(plan.num_buckets(flow) for flow in plan.flows)
    encoded = len(encode_plan(plan))
    return Size(len(plan.classes), len(groups), len(plan.trees), len(plan.flows), buckets, encoded)
