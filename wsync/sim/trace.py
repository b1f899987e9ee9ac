"""A simulation as a Chrome trace (chrome://tracing, ui.perfetto.dev): one process per node, one track per resource.

Source: "Trace Event Format", complete events (``ph`` = ``X``) in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wsync.sim.engine import Resource
from wsync.sim.result import SimResult


def trace_of(result: SimResult, resources: Sequence[Resource]) -> dict[str, Any]:
    """The trace as a JSON object. A span is a time in which a resource was busy, with how much of it."""
    tracks = [r for r in resources if r.spans]
    nodes = {node: pid for pid, node in enumerate(dict.fromkeys(_node(r) for r in tracks), start=1)}
    events: list[dict[str, Any]] = [_meta("process_name", 0, 0, "replicas")]
    events += [_meta("process_name", pid, 0, node) for node, pid in nodes.items()]
    for tid, replica in enumerate(result.replicas):
        events.append(_meta("thread_name", 0, tid, replica.name))
        received_s = replica.received_until(result.horizon_s)
        events.append(_span("receive" if not replica.fault else replica.fault, 0, tid, 0.0, received_s))
        if replica.commit_s is not None and replica.staged_s is not None:
            events.append(_span("commit", 0, tid, replica.staged_s, replica.commit_s))
    for tid, resource in enumerate(tracks):
        pid = nodes[_node(resource)]
        events.append(_meta("thread_name", pid, tid, resource.name.partition("/")[2] or resource.name))
        for begin, end, busy in resource.spans:
            share = busy / (end - begin) if end > begin else 1.0
            events.append(_span(resource.kind, pid, tid, begin, end, busy_s=busy, share=round(min(share, 1.0), 4)))
    for event in result.events:
        at = round(event.time_s * 1e6, 3)
        events.append({"name": event.what, "ph": "i", "ts": at, "pid": 0, "tid": 0, "s": "g"})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"scenario": result.name}}


def _node(resource: Resource) -> str:
    return resource.name.partition("/")[0]


def _meta(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _span(name: str, pid: int, tid: int, begin_s: float, end_s: float, **args: float) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "ts": round(begin_s * 1e6, 3),
        "dur": round(max(end_s - begin_s, 0.0) * 1e6, 3),
        "pid": pid,
        "tid": tid,
        "args": args,
    }
