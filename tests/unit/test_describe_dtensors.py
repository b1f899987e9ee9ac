"""Described FSDP2 layouts against what torch's own sharding leaves in each rank's local tensors.

Every rank of a world is played in turn, over torch's fake process group: `fully_shard` and `parallelize_module` cut
numbered tensors as they would on that rank.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from describe_checks import held
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from wsync.describe import ModelShape, describe_source, load_model
from wsync.errors import ConfigError
from wsync.spec.manifest import TensorSpec

pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 26,
}
# As torchtitan's `apply_tp` does it.
PLAN = {
    "model.embed_tokens": RowwiseParallel,
    "lm_head": ColwiseParallel,
    **{f"model.layers.*.self_attn.{n}_proj": ColwiseParallel for n in "qkv"},
    "model.layers.*.self_attn.o_proj": RowwiseParallel,
    "model.layers.*.mlp.gate_proj": ColwiseParallel,
    "model.layers.*.mlp.up_proj": ColwiseParallel,
    "model.layers.*.mlp.down_proj": RowwiseParallel,
}


@pytest.fixture
def as_rank():
    """Makes the process a rank of a world, and gives the mesh of that world."""

    def play(rank, shape, names):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=int(np.prod(shape)), store=FakeStore())
        return init_device_mesh("cpu", shape, mesh_dim_names=names)

    yield play
    if dist.is_initialized():
        dist.destroy_process_group()


def number(tensor):
    return torch.arange(tensor.numel(), dtype=torch.float32).reshape(tensor.shape)


def local_numbers(tensor):
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return np.sort(local.detach().numpy().ravel().astype(np.int64))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    for parameter in model.parameters():
        parameter.data = number(parameter)
    return model


def shard(model, mesh, dims):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh[dims])
    fully_shard(model, mesh=mesh[dims])


def config_file(folder):
    import json

    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.mark.parametrize(
    ("layout", "shape", "names"),
    [
        ("fsdp=3", (3,), ("fsdp",)),
        ("fsdp=8", (8,), ("fsdp",)),
        ("replicate=2,fsdp=3", (2, 3), ("replicate", "fsdp")),
        ("fsdp=3,tp=2", (3, 2), ("fsdp", "tp")),
        ("fsdp=2,tp=4", (2, 4), ("fsdp", "tp")),
        ("replicate=2,fsdp=2,tp=2", (2, 2, 2), ("replicate", "fsdp", "tp")),
    ],
)
def test_a_decoders_ranks_hold_what_torch_leaves_them(as_rank, tmp_path, layout, shape, names):
    world = int(np.prod(shape))
    source = describe_source(load_model(config_file(tmp_path)), layout, ["h"] * world)
    for rank in range(world):
        mesh = as_rank(rank, shape, names)
        model = llama()
        if "tp" in names:
            parallelize_module(model, mesh["tp"], {k: make() for k, make in PLAN.items()}, src_data_rank=None)
        dims = tuple(n for n in names if n != "tp")
        shard(model, mesh, dims if len(dims) > 1 else dims[0])
        parameters = dict(model.named_parameters())
        assert parameters.keys() == {t.name for t in source.tensors}
        for name, parameter in parameters.items():
            np.testing.assert_array_equal(np.sort(held(source, name, rank)), local_numbers(parameter), err_msg=name)


EXPERTS = 6
KINDS = {"gate_proj": (20, 8), "up_proj": (20, 8), "down_proj": (8, 20)}
"""Rows and columns of one expert's projections."""


def experts_model():
    tensors = [
        TensorSpec(f"model.layers.0.mlp.experts.{e}.{kind}.weight", shape, "bfloat16")
        for e in range(EXPERTS)
        for kind, shape in KINDS.items()
    ]
    return ModelShape("experts", tuple(tensors), "a test")


@pytest.mark.parametrize(
    ("layout", "fsdp", "ep", "etp"),
    [
        ("fsdp=4,ep=2", 2, 2, 1),
        ("fsdp=4,tp=2,ep=2", 4, 2, 1),
        ("fsdp=6,ep=6", 1, 6, 1),
        ("fsdp=6,ep=2", 3, 2, 1),
        ("fsdp=8,ep=1", 8, 1, 1),
        ("fsdp=4,tp=2,ep=2,etp=2", 2, 2, 2),
        ("fsdp=4,experts=stacked", 4, 1, 1),
        ("fsdp=8,experts=stacked", 8, 1, 1),
    ],
)
def test_stacked_experts_are_cut_by_experts_or_by_rows_as_torch_cuts_them(as_rank, layout, fsdp, ep, etp):
    """The experts of a projection are one parameter ``[E, rows, cols]``, which torchtitan has `fully_shard` cut."""
    world = fsdp * ep * etp
    source = describe_source(experts_model(), layout, ["h"] * world)
    by_rows = ep > 1 and fsdp * ep > EXPERTS  # torchtitan's `apply_fsdp`
    for rank in range(world):
        mesh = as_rank(rank, (fsdp, ep, etp), ("fsdp", "ep", "etp"))
        for kind, (rows, cols) in KINDS.items():
            module = nn.Module()
            full = number(torch.empty(EXPERTS, rows, cols))
            dims = [(n, Shard(0 if n == "ep" else 2 if kind == "down_proj" else 1)) for n in ("ep", "etp")]
            dims = [(n, placement) for n, placement in dims if mesh[n].size() > 1]
            if dims:
                inner = mesh[tuple(n for n, _ in dims)]
                full = distribute_tensor(full, inner, [p for _, p in dims], src_data_rank=None)
            module.weight = nn.Parameter(full)
            fully_shard(module, mesh=mesh["fsdp"], shard_placement_fn=lambda _: Shard(1 if by_rows else 0))
            ours = [
                e * rows * cols + held(source, f"model.layers.0.mlp.experts.{e}.{kind}.weight", rank)
                for e in range(EXPERTS)
            ]
            np.testing.assert_array_equal(np.sort(np.concatenate(ours)), local_numbers(module.weight), err_msg=kind)


def test_what_torch_refuses_to_cut_is_refused(as_rank):
    model = ModelShape("m", (TensorSpec("model.layers.0.mlp.experts.gate_up_proj", (2, 10, 4), "bfloat16"),), "a test")
    with pytest.raises(ConfigError, match="10, which fsdp \\* tp / \\(ep \\* etp\\)=4 does not divide"):
        describe_source(model, "fsdp=8,ep=2", ["h"] * 8)
    mesh, module = as_rank(0, (4,), ("fsdp",)), nn.Module()
    module.weight = nn.Parameter(torch.empty(1, 10, 4))
    with pytest.raises(NotImplementedError, match="uneven sharding on dim 1"):
        fully_shard(module, mesh=mesh, shard_placement_fn=lambda _: Shard(1))


def test_experts_that_the_ranks_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="fsdp \\* tp is 16, which ep \\* etp=3 does not divide"):
        describe_source(experts_model(), "fsdp=8,tp=2,ep=3", ["h"] * 16)
