"""How long it takes to describe large models, to write and to read that: ``pytest bench/test_describe.py``."""

from __future__ import annotations

import pytest

from wsync.describe import describe_sink, describe_source, load_manifest, load_model, save_manifest, summarise

TRAINERS = [
    ("Kimi-K2", "fsdp=256"),
    ("Kimi-K2", "fsdp=32,tp=8,ep=16"),
    ("Kimi-K2", "tp=8,pp=4,pp_first=16,pp_last=15,ep=32,dp=8"),
    ("Kimi-K2", "zero3=256"),
    ("DeepSeek-V3", "fsdp=256"),
]
ENGINES = [
    ("Kimi-K2", "ep=16,replicas=8", 128, "fp8_block128"),
    ("Kimi-K2", "tp=8,pp=2,replicas=8", 128, "bf16"),
    ("DeepSeek-V3", "ep=32,replicas=8", 256, "fp8_block128"),
]


def hosts(prefix, count):
    return [f"{prefix}{rank // 8}" for rank in range(count)]


@pytest.mark.parametrize("name", ["Kimi-K2", "Qwen3-235B-A22B"])
def test_names_and_shapes(benchmark, name):
    assert benchmark(load_model, name).tensors


@pytest.mark.parametrize(("name", "layout"), TRAINERS)
def test_a_trainer_of_256(benchmark, name, layout):
    source = benchmark(describe_source, load_model(name), layout, hosts("t", 256))
    assert len({id(shards) for shards in source.shards}) < 400


@pytest.mark.parametrize(("name", "layout", "ranks", "recipe"), ENGINES)
def test_engines(benchmark, name, layout, ranks, recipe):
    sink = benchmark.pedantic(describe_sink, (load_model(name), layout, hosts("e", ranks), recipe), rounds=3)
    assert len({id(rank.copies) for rank in sink.ranks}) == ranks // 8


@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_write_read_and_add_up_kimi_k2(benchmark, tmp_path, side):
    model = load_model("Kimi-K2")
    if side == "trainer":
        manifest = describe_source(model, "fsdp=256", hosts("t", 256))
    else:
        manifest = describe_sink(model, "ep=16,replicas=8", hosts("e", 128), "fp8_block128")

    def write_and_read():
        save_manifest(manifest, tmp_path / "file")
        return summarise(load_manifest(tmp_path / "file"))

    assert benchmark.pedantic(write_and_read, rounds=3) == summarise(manifest)
    assert (tmp_path / "file").stat().st_size < 8 << 20
