"""DTensors of real trainer processes arrive as the quantiser would have written them from the whole tensor.

Shard edges lie off the scale grids on purpose: blocks, rows and whole tensors are cut and their amaxes are exchanged
between the ranks. Only groups of columns that are encoded together must be whole.
"""

from __future__ import annotations

import dtensor_workers
import pytest
import torch

import wsync
from wsync.formats import quantize_reference
from wsync.spec.recipes import get_recipe
from wsync.testing.processes import Processes, free_port

pytestmark = pytest.mark.multiproc

QUANTISED = ("plain", "wide", "stack")
GROUP = ("plain", "wide")
"""Tensors that share an amax where the recipe has one for the whole tensor."""


def expected(version, dtype, recipe):
    whole = dtensor_workers.published(version, dtype)
    shared = torch.stack([whole[name].float().abs().max() for name in GROUP]).max()
    parts = {}
    for name, full in whole.items():
        if name not in QUANTISED or recipe == "bf16":
            parts[name] = full
            continue
        amax = shared if get_recipe(recipe).needs_amax and name in GROUP else None
        for part, value in quantize_reference(full, recipe, amax).items():
            parts[name + part.removeprefix("weight")] = value
    return parts


def start_trainers(processes, world_size, layout, dtype, store, key_file, folder, transport):
    for rank in range(world_size):
        args = (rank, world_size, layout, dtype, store, key_file, str(folder / "init"), transport)
        processes.start(f"trainer/{rank}", dtensor_workers.trainer, *args)


@pytest.mark.parametrize(
    ("layout", "world_size", "dtype", "recipe", "transport"),
    [
        ("fsdp", 3, "bfloat16", "fp8_block128", "shm"),
        ("tp+fsdp", 4, "bfloat16", "fp8_block128_f32", "shm"),
        ("tp+fsdp", 4, "float32", "bf16", "shm"),
        ("tp+fsdp", 4, "float32", "fp8_channel", "gloo"),
        ("tp+fsdp", 4, "bfloat16", "fp8_tensor", "shm"),
        ("fsdp", 3, "float32", "mxfp8", "gloo"),
        ("tp+fsdp", 4, "bfloat16", "nvfp4", "shm"),
        ("fsdp", 1, "float16", "nvfp4", "shm"),
    ],
)
def test_cut_blocks_come_out_as_from_the_whole_tensor(tmp_path, layout, world_size, dtype, recipe, transport):
    key_file = str(wsync.new_key_file(tmp_path / "wsync.key"))
    store = f"tcp://127.0.0.1:{free_port()}"
    live = {name: torch.zeros_like(t) for name, t in expected(1, dtype, recipe).items()}
    groups = (GROUP,) if get_recipe(recipe).needs_amax else None
    recipes = dict.fromkeys(QUANTISED, recipe)
    with Processes() as processes:
        start_trainers(processes, world_size, layout, dtype, store, key_file, tmp_path, transport)
        with wsync.Sink(
            live, store=store, key_file=key_file, recipes=recipes, scale_groups=groups, join_deadline_s=90
        ) as sink:
            for version in (1, 2):
                sink.commit(sink.prepare(60))
                assert sink.version == version
                for name, want in expected(version, dtype, recipe).items():
                    same = live[name].reshape(-1).view(torch.uint8).equal(want.reshape(-1).view(torch.uint8))
                    assert same, (version, name)
        for rank in range(world_size):
            outcome = processes.wait(f"trainer/{rank}")
            assert outcome.error is None, outcome.trace
            assert outcome.value == sum(t.numel() * t.element_size() for t in live.values())


def test_a_shard_that_cuts_a_group_of_columns_is_refused_before_anything_moves(tmp_path):
    key_file = str(wsync.new_key_file(tmp_path / "wsync.key"))
    store = f"tcp://127.0.0.1:{free_port()}"
    live = {name: torch.zeros_like(t) for name, t in expected(1, "bfloat16", "mxfp8").items()}
    says = r"'mxfp8' encodes 32 columns of 'wide' together.*trainer rank 0 is at column 272.*columns 256 to 287"
    with Processes() as processes:
        start_trainers(processes, 4, "tp+fsdp", "bfloat16", store, key_file, tmp_path, "shm")
        args = {"recipes": dict.fromkeys(QUANTISED, "mxfp8"), "join_deadline_s": 90}
        with pytest.raises(wsync.RecipeError, match=says):
            wsync.Sink(live, store=store, key_file=key_file, **args)
    assert not any(t.reshape(-1).view(torch.uint8).any() for t in live.values())
