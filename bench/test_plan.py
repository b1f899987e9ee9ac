"""How long planning takes: the model of the main job, and large ones. Run with ``pytest bench/test_plan.py``.

Peak memory, in processes of their own, is in the record of ``python -m wsync.bench.planning``.
"""

from __future__ import annotations

import itertools
import os
import time

import pytest

from wsync.bench.planning import CASES, job_of
from wsync.bench.planning_result import MAX_REPLAN_SHARE, MAX_SLICE_BYTES
from wsync.plan import (
    Planner,
    PlanOptions,
    compact_sink,
    compact_source,
    expand_sink,
    make_plan,
    plan_digest,
    sink_slices,
    source_slices,
)
from wsync.spec import SinkManifest
from wsync.spec.serde import encode
from wsync.testing.generators import dense_tensors, fsdp_source, moe_tensors, qwen3_0p6b_tensors, tp_sink

STRICT = os.environ.get("WSYNC_BENCH_STRICT") == "1"


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block128"])
def test_plan_qwen3_0p6b_from_2_to_2(benchmark, recipe):
    tensors = qwen3_0p6b_tensors()
    source, sink = fsdp_source(tensors, ["h"] * 2), tp_sink(tensors, [["h"] * 2], recipe)
    plan = benchmark(make_plan, source, sink)
    assert plan.wire_bytes <= 596_049_920 * 2


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block128"])
def test_plan_94_layers_of_128_experts_from_64_to_32(benchmark, recipe):
    tensors = moe_tensors(94, 4096, 64, 4, 128, 128, 1536, 151936)
    source = fsdp_source(tensors, [f"t{i // 8}" for i in range(64)])
    sink = tp_sink(tensors, [[f"e{r}"] * 8 for r in range(4)], recipe)
    plan = benchmark.pedantic(make_plan, (source, sink, None, PlanOptions(32 << 20)), rounds=2)
    assert plan.num_sinks == 32


def test_plan_10_000_tensors_from_64_to_32(benchmark):
    tensors = dense_tensors(909, 2048, 16, 8, 128, 8192, 32768)
    assert len(tensors) > 10_000
    source = fsdp_source(tensors, [f"t{i // 8}" for i in range(64)])
    sink = tp_sink(tensors, [[f"e{r}"] * 8 for r in range(4)])
    benchmark.pedantic(make_plan, (source, sink, None, PlanOptions(32 << 20)), rounds=1)


def test_slice_and_digest_of_qwen3_0p6b(benchmark):
    tensors = qwen3_0p6b_tensors()
    plan = make_plan(fsdp_source(tensors, ["h"] * 2), tp_sink(tensors, [["h"] * 2], "fp8_block128"))
    benchmark(lambda: (plan_digest(plan), source_slices(plan), sink_slices(plan)))


# ---- jobs as large as those that others have published


@pytest.fixture(scope="module", params=list(CASES))
def job(request):
    return CASES[request.param], *job_of(CASES[request.param])


def test_plan_a_large_job(benchmark, job):
    case, source, sink, cluster = job
    plan = benchmark.pedantic(make_plan, (source, sink, cluster), rounds=3)
    assert plan.score <= 1.05
    if STRICT:
        assert benchmark.stats.stats.median <= case.bar_s


def test_plan_a_large_job_again_without_a_replica(benchmark, job):
    _, source, sink, cluster = job
    planner = Planner(source, cluster)
    whole = planner.plan(sink)
    names = itertools.cycle(dict.fromkeys(rank.replica for rank in sink.ranks))

    def lose_one():
        planner.plan(sink, afresh=True)
        name = next(names)
        return (SinkManifest(tuple(rank for rank in sink.ranks if rank.replica != name)),), {}

    plan = benchmark.pedantic(planner.plan, setup=lose_one, rounds=5)
    assert plan.flows == whole.flows
    assert plan.score <= 1.05
    if STRICT:
        begin = benchmark.stats.stats.median
        again = _timed(lambda: Planner(source, cluster).plan(sink))
        assert begin <= MAX_REPLAN_SHARE * again


def _timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_slices_of_a_large_job(benchmark, job):
    _, source, sink, cluster = job
    plan = make_plan(source, sink, cluster)
    digest = plan_digest(plan)
    sizes = benchmark.pedantic(
        lambda: [len(encode(c)) for c in (compact_source(plan, 0, digest), compact_sink(plan, 0, digest))], rounds=3
    )
    assert max(sizes) <= MAX_SLICE_BYTES


def test_expand_a_slice_of_a_large_job(benchmark, job):
    _, source, sink, cluster = job
    compact = compact_sink(make_plan(source, sink, cluster), 0)
    slice_ = benchmark.pedantic(expand_sink, (compact,), rounds=3)
    benchmark.extra_info["num_pieces"] = sum(len(b.pieces) for b in slice_.buckets)
