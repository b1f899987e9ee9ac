"""Engines that hold other values than travel: dequantised weights, and block scales made powers of two."""

from __future__ import annotations

import pytest
import torch
from fused_engine import FusedEngine, checkpoint_shapes
from test_fused_recipes import commit_all, make_weights

import wsync
from wsync.formats import dequantize_reference, quantize_reference, requantize_e8m0_reference
from wsync.spec.recipes import RECIPES

QUANTISED = tuple(name for name, recipe in RECIPES.items() if recipe.quantised)
MATRICES = tuple(name for name, shape in checkpoint_shapes().items() if len(shape) > 1)


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


@pytest.mark.parametrize("recipe", QUANTISED)
def test_a_float_engine_holds_the_values_that_quantised_engines_compute_with(key_file, recipe):
    weights = make_weights(7, torch.float32)
    engines = [FusedEngine("bf16", rank, 2) for rank in range(2)]
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        sinks = [
            wsync.Sink(
                engine,
                engine.load_weights,
                store=source.store,
                key_file=key_file,
                rank=rank,
                world_size=2,
                recipes=dict.fromkeys(MATRICES, recipe),
                transforms=dict.fromkeys(MATRICES, "dequantise"),
            )
            for rank, engine in enumerate(engines)
        ]
        for version in (1, 2):
            for name, fresh in make_weights(version, torch.float32).items():
                weights[name].copy_(fresh)
            publication = source.publish(version, deadline_s=30)
            commit_all(sinks, version)
            report = publication.wait_committed()
        floats = sum(2 * w.numel() for w in weights.values())
        coverage = sinks[0].recording.coverage
        assert (coverage.direct_bytes, coverage.transformed_bytes) == (128, (floats - 128) // 2)
        assert "are transformed at the commit" in coverage.describe()
        assert report.wire_bytes < 0.66 * floats
        for sink in sinks:
            sink.close()
    for engine in engines:
        twin = FusedEngine("bf16", engine.rank, 2)
        twin.load_weights(
            (n, dequantize_reference(quantize_reference(w.bfloat16(), recipe), recipe, torch.bfloat16))
            if n in MATRICES
            else (n, w.bfloat16())
            for n, w in weights.items()
        )
        for (name, got), want in zip(engine.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(got, want), name


@pytest.mark.parametrize("recipe", ["fp8_block128", "fp8_block128_f32"])
def test_blocks_are_requantised_as_engines_do_when_they_load(key_file, recipe):
    g = torch.Generator().manual_seed(1)
    weights = {"w": torch.randn(300, 200, generator=g).bfloat16(), "stack": torch.randn(2, 256, 128, generator=g)}
    whole = {name: quantize_reference(w.bfloat16(), recipe) for name, w in weights.items()}
    live = {}
    for name, parts in whole.items():
        live |= {name + part.removeprefix("weight"): torch.zeros_like(value) for part, value in parts.items()}
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with wsync.Sink(
            live,
            store=source.store,
            key_file=key_file,
            recipes=dict.fromkeys(weights, recipe),
            transforms=lambda spec: "requantise_e8m0",
        ) as sink:
            publication = source.publish(1, deadline_s=30)
            commit_all([sink], 1)
            publication.wait_committed()
    for name, parts in whole.items():
        codes, scales = requantize_e8m0_reference(parts["weight"], parts["weight_scale_inv"])
        assert torch.equal(live[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(live[name + "_scale_inv"], scales)


def test_transforms_that_cannot_be_are_named(key_file):
    weights = {"w": torch.ones(256, 128, dtype=torch.bfloat16), "ids": torch.ones(8, 8, dtype=torch.int64)}
    live = {name: torch.zeros_like(w) for name, w in weights.items()}
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        for recipes, transforms, error, says in [
            ({}, {"w": "squash"}, wsync.ConfigError, "'squash' of 'w' is unknown; known are dequantise"),
            ({}, {"v": "dequantise"}, wsync.ConfigError, "'v', which is no tensor of the trainer's 2"),
            ({}, {"w": "dequantise"}, wsync.RecipeError, "takes a quantising recipe, but 'w' has recipe 'bf16'"),
            ({"w": "mxfp8"}, {"w": "requantise_e8m0"}, wsync.RecipeError, "takes scales of 128 x 128 blocks, but 'w'"),
        ]:
            with pytest.raises(error, match=says):
                wsync.Sink(live, store=source.store, key_file=key_file, recipes=recipes, transforms=transforms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stacks_are_dequantised_into_the_floats_that_the_engine_holds(key_file, dtype):
    """In all recipes at once; f32 masters are rounded to bf16 before they are encoded, and decoded to f32."""
    g = torch.Generator().manual_seed(9)
    weights = {recipe: (torch.randn(3, 70, 96, generator=g) * 5).to(dtype) for recipe in QUANTISED}
    live = {name: torch.zeros_like(w).transpose(1, 2).contiguous().transpose(1, 2) for name, w in weights.items()}
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with wsync.Sink(
            live,
            store=source.store,
            key_file=key_file,
            recipes={name: name for name in QUANTISED},
            transforms=dict.fromkeys(QUANTISED, "dequantise"),
        ) as sink:
            publication = source.publish(1, deadline_s=30)
            commit_all([sink], 1)
            publication.wait_committed()
    for name, weight in weights.items():
        taken = weight.bfloat16() if dtype == torch.float32 else weight
        assert torch.equal(live[name], dequantize_reference(quantize_reference(taken, name), name, dtype)), name


def test_columns_that_cut_a_packed_group_are_refused_before_anything_moves(key_file):
    weights = {"w": torch.ones(8, 64, dtype=torch.bfloat16)}
    live = torch.zeros(8, 16, dtype=torch.bfloat16)

    def load(pairs):
        for _, value in pairs:
            live.copy_(value[:, 17:33])

    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        args = {"recipes": {"w": "nvfp4"}, "transforms": {"w": "dequantise"}}
        with pytest.raises(wsync.RecipeError, match=r"encodes 16 columns of 'w' together, but an edge of .* column 17"):
            wsync.Sink({"x": live}, load, store=source.store, key_file=key_file, **args)
