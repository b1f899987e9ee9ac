"""Plans: blocks, routing, lower bound, buckets, and the programs that replay them."""

from wsync.plan.planner import make_plan
from wsync.plan.slices import plan_digest, sink_slice, sink_slices, source_slice, source_slices
from wsync.plan.types import Bound, Plan, PlanOptions, SinkSlice, SourceSlice

__all__ = [
    "Bound",
    "Plan",
    "PlanOptions",
    "SinkSlice",
    "SourceSlice",
    "make_plan",
    "plan_digest",
    "sink_slice",
    "sink_slices",
    "source_slice",
    "source_slices",
]
