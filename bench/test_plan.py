"""How long planning takes: the model of the main job, and large ones. Run with ``pytest bench/test_plan.py``."""

from __future__ import annotations

import pytest

from wsync.plan import PlanOptions, make_plan, plan_digest, sink_slices, source_slices
from wsync.testing.generators import dense_tensors, fsdp_source, moe_tensors, qwen3_0p6b_tensors, tp_sink


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block128"])
def test_plan_qwen3_0p6b_from_2_to_2(benchmark, recipe):
    tensors = qwen3_0p6b_tensors()
    source, sink = fsdp_source(tensors, ["h"] * 2), tp_sink(tensors, [["h"] * 2], recipe)
    plan = benchmark(make_plan, source, sink)
    assert plan.score < 1.01


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
