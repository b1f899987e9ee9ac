"""DTensors of real trainer processes arrive as the quantiser would have written them from the whole tensor.

Shard edges lie off the 128 grid on purpose: scale blocks are cut and their amax is exchanged between the ranks.
"""

from __future__ import annotations

import dtensor_workers
import pytest
import torch

import wsync
from wsync.formats import quantize_reference
from wsync.testing.processes import Processes, free_port

pytestmark = pytest.mark.multiproc

QUANTISED = ("plain", "wide", "stack")


def expected(version, recipe):
    parts = {}
    for name, full in dtensor_workers.full_tensors(version).items():
        full = full.to(torch.bfloat16)
        if name not in QUANTISED or recipe == "bf16":
            parts[name] = full
        elif full.dim() == 2:
            done = quantize_reference(full, recipe)
            parts[name], parts[name + "_scale_inv"] = done["weight"], done["weight_scale_inv"]
        else:
            done = [quantize_reference(matrix, recipe) for matrix in full]
            parts[name] = torch.stack([d["weight"].view(torch.uint8) for d in done]).view(torch.float8_e4m3fn)
            parts[name + "_scale_inv"] = torch.stack([d["weight_scale_inv"] for d in done])
    return parts


@pytest.mark.parametrize(
    ("layout", "world_size", "dtype", "recipe", "transport"),
    [
        ("fsdp", 3, "bfloat16", "fp8_block128", "shm"),
        ("fsdp", 3, "float32", "fp8_block128_f32", "gloo"),
        ("tp+fsdp", 4, "bfloat16", "fp8_block128_f32", "shm"),
        ("tp+fsdp", 4, "float32", "bf16", "shm"),
    ],
)
def test_cut_blocks_come_out_as_from_the_whole_tensor(tmp_path, layout, world_size, dtype, recipe, transport):
    key_file = str(wsync.new_key_file(tmp_path / "wsync.key"))
    store = f"tcp://127.0.0.1:{free_port()}"
    live = {name: torch.zeros_like(t) for name, t in expected(1, recipe).items()}
    recipes = dict.fromkeys(QUANTISED, recipe)
    with Processes() as processes:
        for rank in range(world_size):
            args = (rank, world_size, layout, dtype, store, key_file, str(tmp_path / "init"), transport)
            processes.start(f"trainer/{rank}", dtensor_workers.trainer, *args)
        with wsync.Sink(live, store=store, key_file=key_file, recipes=recipes, join_deadline_s=90) as sink:
            for version in (1, 2):
                sink.commit(sink.prepare(60))
                assert sink.version == version
                for name, want in expected(version, recipe).items():
                    assert torch.equal(live[name].view(torch.uint8), want.view(torch.uint8)), (version, name)
        for rank in range(world_size):
            outcome = processes.wait(f"trainer/{rank}")
            assert outcome.error is None, outcome.trace
            assert outcome.value == sum(t.numel() * t.element_size() for t in live.values())
