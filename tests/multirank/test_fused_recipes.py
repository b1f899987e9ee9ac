"""Fused and stacked parameters of a tensor-parallel engine hold what its loader makes of a quantised checkpoint."""

from __future__ import annotations

import threading

import pytest
import torch
from fused_engine import GROUPS, FusedEngine, checkpoint_shapes

import wsync
from wsync.formats import quantize_reference
from wsync.spec.recipes import get_recipe

RECIPES = ("fp8_channel", "fp8_tensor", "mxfp8", "nvfp4")


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


def make_weights(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return {
        n: (torch.randn(s, generator=g) * (1 + i)).to(dtype) for i, (n, s) in enumerate(checkpoint_shapes().items())
    }


def checkpoint(weights, recipe, groups):
    """Names and tensors of a checkpoint in the recipe, by the reference."""
    for name, weight in weights.items():
        weight = weight.to(torch.bfloat16) if weight.dtype == torch.float32 else weight
        if weight.dim() < 2:
            yield name, weight.to(torch.bfloat16)
            continue
        group = next((g for g in groups if name in g), (name,))
        amax = torch.stack([weights[n].to(torch.bfloat16).float().abs().max() for n in group]).max()
        for part, value in quantize_reference(weight, recipe, amax if get_recipe(recipe).needs_amax else None).items():
            yield name + part.removeprefix("weight"), value


def recipes(recipe):
    return {n: recipe for n, shape in checkpoint_shapes().items() if len(shape) > 1}


def commit_all(sinks, version):
    def commit(sink):
        sink.commit(sink.prepare(30))

    threads = [threading.Thread(target=commit, args=(s,)) for s in sinks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [s.version for s in sinks] == [version] * len(sinks)


def join_all(engines, recipe, source, key_file, **args):
    """Sinks of one replica."""
    return [
        wsync.Sink(
            engine,
            engine.load_weights,
            store=source.store,
            key_file=key_file,
            rank=rank,
            world_size=len(engines),
            recipes=recipes(recipe),
            **args,
        )
        for rank, engine in enumerate(engines)
    ]


def check(engine, weights, recipe, groups):
    twin = FusedEngine(recipe, engine.rank, engine.world_size)
    twin.load_weights(checkpoint(weights, recipe, groups))
    for (name, got), want in zip(engine.named_parameters(), twin.parameters(), strict=True):
        assert got.reshape(-1).view(torch.uint8).equal(want.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tensor_parallel_engine_holds_what_its_loader_makes_of_the_checkpoint(key_file, recipe):
    weights = make_weights(0, torch.float32)
    engines = [FusedEngine(recipe, rank, 2) for rank in range(2)]
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        sinks = join_all(engines, recipe, source, key_file)
        for version in (1, 2):
            for name, fresh in make_weights(version, torch.float32).items():
                weights[name].copy_(fresh)
            publication = source.publish(version, deadline_s=30)
            commit_all(sinks, version)
            publication.wait_committed()
            for engine in engines:
                check(engine, weights, recipe, GROUPS)
        for sink in sinks:
            sink.close()


@pytest.mark.parametrize("groups", [(GROUPS[0],), ()])
def test_scale_groups_are_those_that_the_sink_declares(key_file, groups):
    """Without a group the fused matrix has the scale of the tensor that the loader copies last."""
    weights = make_weights(3, torch.bfloat16)
    engine = FusedEngine("fp8_tensor", 0, 1)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        (sink,) = join_all([engine], "fp8_tensor", source, key_file, scale_groups=groups)
        publication = source.publish(1, deadline_s=30)
        commit_all([sink], 1)
        publication.wait_committed()
        check(engine, weights, "fp8_tensor", groups)
        sink.close()


def test_the_trainer_declares_a_recipe_for_engines_that_declare_none(key_file):
    weights = make_weights(4, torch.float16)
    weights["norm.weight"] = weights["norm.weight"].to(torch.bfloat16)
    engine = FusedEngine("nvfp4", 0, 1)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file, recipe="nvfp4") as source:
        sink = wsync.Sink(engine, engine.load_weights, store=source.store, key_file=key_file)
        publication = source.publish(1, deadline_s=30)
        commit_all([sink], 1)
        publication.wait_committed()
        twin = FusedEngine("nvfp4", 0, 1)
        parts = {}
        for name, weight in weights.items():
            group = next((g for g in GROUPS if name in g), (name,))
            amax = torch.stack([weights[n].float().abs().max() for n in group]).max()
            made = quantize_reference(weight, "nvfp4", amax) if weight.dim() > 1 else {"weight": weight}
            parts |= {name + part.removeprefix("weight"): value for part, value in made.items()}
        twin.load_weights(parts.items())
        for (name, got), want in zip(engine.named_parameters(), twin.parameters(), strict=True):
            assert got.reshape(-1).view(torch.uint8).equal(want.reshape(-1).view(torch.uint8)), name
        sink.close()


def test_scale_groups_and_recipes_that_cannot_be_are_named(key_file):
    weights = make_weights(5, torch.bfloat16)
    engine = FusedEngine("fp8_tensor", 0, 1)
    q, k, v = GROUPS[0]
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        for groups, error, says in [
            ("ab", wsync.ConfigError, "list of groups of checkpoint names"),
            (((q, "no.such"),), wsync.UnknownTensorError, "'no.such'"),
            (((q, k), (k, v)), wsync.ManifestError, rf"'{k}' in two scale groups"),
            (((q, "norm.weight"),), wsync.ManifestError, "'bf16', but both in one scale group"),
        ]:
            with pytest.raises(error, match=says):
                join_all([engine], "fp8_tensor", source, key_file, scale_groups=groups)
    with pytest.raises(wsync.RecipeError, match="recipe 'mxfp8' takes tensors of 2 or more dimensions"):
        wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file, recipe={"norm.weight": "mxfp8"})
    with pytest.raises(wsync.UnknownTensorError, match=r"'no\.such'"):
        wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file, recipe={"no.such": "bf16"})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_that_is_not_finite_is_named_in_every_recipe(key_file, recipe):
    weights = make_weights(6, torch.bfloat16)
    engine = FusedEngine(recipe, 0, 1)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        (sink,) = join_all([engine], recipe, source, key_file)
        weights["experts.1.w3.weight"][17, 41] = float("inf")
        publication = source.publish(1, deadline_s=30)
        says = r"'experts\.1\.w3\.weight' is not finite at index \(17, 41\)"
        with pytest.raises(wsync.NonFiniteError, match=says):
            sink.prepare(30)
        with pytest.raises(wsync.NonFiniteError, match=says):
            publication.wait_committed()
        assert not any(p.reshape(-1).view(torch.uint8).any() for p in engine.parameters())
        sink.close()
