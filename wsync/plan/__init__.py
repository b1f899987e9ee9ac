"""Plans: blocks, routing, lower bound, flows, slices, and the programs that replay them."""

from wsync.plan.expand import ExpandedPlan, expand_plan
from wsync.plan.planner import make_plan
from wsync.plan.plans import Plan, PlanClass, PlanPart, PlanUnit, decode_plan, encode_plan, plan_digest
from wsync.plan.replan import Planner
from wsync.plan.slices import (
    CompactSlice,
    compact_sink,
    compact_source,
    expand_sink,
    expand_source,
    sink_slice,
    sink_slices,
    source_slice,
    source_slices,
)
from wsync.plan.types import Bound, PlanOptions, SinkSlice, SourceSlice

__all__ = [
    "Bound",
    "CompactSlice",
    "ExpandedPlan",
    "Plan",
    "PlanClass",
    "PlanOptions",
    "PlanPart",
    "PlanUnit",
    "Planner",
    "SinkSlice",
    "SourceSlice",
    "compact_sink",
    "compact_source",
    "decode_plan",
    "encode_plan",
    "expand_plan",
    "expand_sink",
    "expand_source",
    "make_plan",
    "plan_digest",
    "sink_slice",
    "sink_slices",
    "source_slice",
    "source_slices",
]
