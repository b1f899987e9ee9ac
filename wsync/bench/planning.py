"""How long large jobs take to plan: ``python -m wsync.bench.planning --json RECORD --markdown DOCUMENT``.

Manifests come from `wsync.describe`, so no weights and no cluster are needed. Every job runs in a process of its own,
whose peak memory is its own. Seconds are processor seconds: planning uses one core and waits for nothing.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from wsync.bench.machine import describe_machine, package_versions
from wsync.bench.markdown import splice
from wsync.bench.planning_result import PlanningResult, PlanningRow, planning_table_of
from wsync.describe import describe_sink, describe_source, load_model
from wsync.plan import Plan, Planner, compact_sink, compact_source, expand_sink, plan_digest
from wsync.spec import Cluster, Nic, NicPath, NodeGroup, SinkManifest
from wsync.spec.manifest import SourceManifest
from wsync.spec.serde import FORMAT_VERSION, encode

T = TypeVar("T")

ROUNDS = 3
GPUS = 8
"""Of a node. Rates of `cluster_of`: NVIDIA DGX H100 user guide (eight ConnectX-7 of 400 Gb/s, NVLink 4)."""


class Case(NamedTuple):
    """A job, and the seconds in which it should be planned."""

    name: str
    model: str
    source_layout: str
    sink_layout: str
    recipe: str
    num_sources: int
    num_sinks: int
    bar_s: float


CASES = {
    "kimi-fsdp": Case(
        "Kimi-K2, FSDP 256 to 128", "kimi-k2", "fsdp=256", "tp=8,ep=8,replicas=16", "fp8_block128", 256, 128, 5.0
    ),
    "kimi-megatron": Case(
        "Kimi-K2, Megatron 256 to 128",
        "kimi-k2",
        "tp=8,pp=16,dp=2,ep=16,pp_first=2,pp_last=3",
        "tp=8,ep=8,replicas=16",
        "fp8_block128",
        256,
        128,
        5.0,
    ),
    "deepseek-fsdp": Case(
        "DeepSeek-V3, FSDP 256 to 256", "deepseek-v3", "fsdp=256", "tp=8,ep=8,replicas=32", "bf16", 256, 256, 3.0
    ),
}


def cluster_of(num_trainer_nodes: int, num_engine_nodes: int) -> Cluster:
    """Trainer nodes ``t0`` ... and engine nodes ``e0`` ..., all alike."""
    nics = tuple(Nic(50.0, i, (NicPath(i, "PIX"),)) for i in range(GPUS))
    rates = {"hbm_gbps": 3350.0, "pcie_gbps": 55.0, "nvlink_gbps": 450.0}

    def group(name: str, letter: str, count: int) -> NodeGroup:
        hosts = tuple(f"{letter}{i}" for i in range(count))
        return NodeGroup(name, count, 200.0, hosts, GPUS, nvlink_domain=GPUS, nics=nics, **rates)

    return Cluster((group("trainers", "t", num_trainer_nodes), group("engines", "e", num_engine_nodes)), alpha_s=1e-5)


def job_of(case: Case) -> tuple[SourceManifest, SinkManifest, Cluster]:
    """Both manifests of a case, and its cluster."""
    model = load_model(case.model)
    source = describe_source(model, case.source_layout, [f"t{i // GPUS}" for i in range(case.num_sources)])
    sink = describe_sink(model, case.sink_layout, [f"e{i // GPUS}" for i in range(case.num_sinks)], case.recipe)
    return source, sink, cluster_of(case.num_sources // GPUS, case.num_sinks // GPUS)


def run_case(case: Case) -> PlanningRow:
    """Measure one job in this process, which should have done nothing else."""
    source, sink, cluster = job_of(case)
    plan, plan_s, replans, replan_s = _planned(source, sink, cluster)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest = plan_digest(plan)
    sources = [len(encode(compact_source(plan, rank, digest))) for rank in range(plan.num_sources)]
    sinks = {i: len(encode(compact_sink(plan, i, digest))) for i in range(GPUS)}
    largest = max(sinks, key=lambda i: sinks[i])
    compact = compact_sink(plan, largest, digest)
    slice_, expand_s = _timed(lambda: expand_sink(compact))
    return PlanningRow(
        case=case.name,
        model=case.model,
        source_layout=case.source_layout,
        sink_layout=case.sink_layout,
        recipe=case.recipe,
        num_tensors=len(source.tensors),
        num_sources=plan.num_sources,
        num_sinks=plan.num_sinks,
        score=plan.score,
        plan_s=plan_s,
        plan_bar_s=case.bar_s,
        replan_s=replan_s,
        replan_score=max(p.score for p in replans),
        peak_bytes=peak_bytes,
        source_slice_bytes=max(sources),
        sink_slice_bytes=sinks[largest],
        num_pieces=sum(len(b.pieces) for b in slice_.buckets),
        expand_s=expand_s,
    )


def _planned(source: SourceManifest, sink: SinkManifest, cluster: Cluster) -> tuple[Plan, float, list[Plan], float]:
    """A plan and one without a replica, several times: another replica each time."""
    names = list(dict.fromkeys(rank.replica for rank in sink.ranks))
    plan_s, replan_s, replans = [], [], []
    for i in range(ROUNDS):
        planner, made_s = _timed(lambda: Planner(source, cluster))
        plan, seconds = _timed(lambda planner=planner: planner.plan(sink))  # type: ignore[misc]
        lost = SinkManifest(tuple(rank for rank in sink.ranks if rank.replica != names[i * len(names) // ROUNDS]))
        again, again_s = _timed(lambda planner=planner, lost=lost: planner.plan(lost))  # type: ignore[misc]
        plan_s.append(made_s + seconds)
        replan_s.append(again_s)
        replans.append(again)
    return plan, statistics.median(plan_s), replans, statistics.median(replan_s)


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its processor seconds."""
    gc.collect()
    begin = time.process_time()
    found = call()
    return found, time.process_time() - begin


def run() -> PlanningResult:
    """Measure every case in a process of its own."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for key in CASES:
        command = [sys.executable, "-m", "wsync.bench.planning", "--case", key]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        rows.append(msgspec.json.decode(out, type=PlanningRow))
    return PlanningResult(
        format_version=FORMAT_VERSION,
        command="python -m wsync.bench.planning",
        started_utc=started,
        machine=describe_machine(),
        versions=package_versions(),
        verdict="ok" if all(row.is_good for row in rows) else "missed",
        planning=tuple(rows),
    )


def main(argv: list[str]) -> int:
    """Measure, and write the record and its table where the command line says."""
    parser = argparse.ArgumentParser(prog="python -m wsync.bench.planning", description=__doc__)
    parser.add_argument("--case", choices=tuple(CASES), help="one job, in this process; its row on stdout")
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--markdown", type=Path, help="a document with a place for the table")
    args = parser.parse_args(argv)
    if args.case:
        sys.stdout.buffer.write(msgspec.json.encode(run_case(CASES[args.case])) + b"\n")
        return 0
    result = run()
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    if args.markdown:
        args.markdown.write_text(splice(args.markdown.read_text(), planning_table_of(result), "planning"))
    sys.stdout.write(planning_table_of(result) + "\n")
    return 0 if result.verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
