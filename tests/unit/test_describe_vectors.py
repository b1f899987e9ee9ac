"""Described layouts against where Megatron-Bridge's, vLLM's, torch's and DeepSpeed's code put numbered elements."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from describe_checks import held, memory, plain, tiny

from wsync.describe import describe_sink, describe_source
from wsync.describe.engines.grid import experts_of_rank
from wsync.describe.models.facts import LinearAttention
from wsync.errors import ConfigError

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
pytestmark = pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")

ATTENTION = "model.layers.0.self_attn."
DELTA = "model.layers.0.linear_attn."


@pytest.fixture(scope="module")
def arrays():
    with np.load(VECTORS / "layouts.npz") as z:
        return {name: z[name] for name in z.files}


def config_of(case):
    (found,) = [c["cfg"] for c in json.loads((VECTORS / "layouts.json").read_text()) if c["name"] == case]
    return found


def ids(source, arrays, case, names, rank):
    """The numbers of all that a rank holds; ``names`` maps tensors to the arrays that number their elements."""
    found = [arrays[f"{case}/{array}"].ravel()[held(source, name, rank)] for name, array in names.items()]
    return np.sort(np.concatenate(found))


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("megatron_qkv_H8_g2_d4_gate0", (1, 2, 4, 8)),
        ("megatron_qkv_H8_g1_d4_gate0", (1, 2, 4, 8)),
        ("megatron_qkv_H8_g2_d4_gate1", (1, 2, 4, 8)),
        ("megatron_qkv_H6_g6_d2_gate1", (1, 2, 3, 6)),
    ],
)
def test_megatrons_ranks_hold_equal_shares_of_the_interleaved_rows(arrays, case, ranks):
    config = config_of(case)
    model = tiny(
        heads=config["num_attention_heads"],
        kv_heads=config["num_query_groups"],
        head_dim=config["kv_channels"],
        gated=config["attention_output_gate"],
        intermediate=24,
    )
    names = {f"{ATTENTION}{n}_proj.weight": n for n in ("q", "k", "v")}
    for tp in ranks:
        source = describe_source(model, f"tp={tp}", ["h"] * tp)
        for rank, share in enumerate(np.split(arrays[f"{case}/qkv"], tp)):
            np.testing.assert_array_equal(ids(source, arrays, case, names, rank), np.sort(share.ravel()))


@pytest.mark.parametrize("tp", [1, 2])
def test_megatrons_ranks_hold_their_heads_of_a_delta_net(arrays, tp):
    case, separate = f"megatron_gdn_in_proj_tp{tp}", "qwen3next_grouped_to_qwen35_separate"
    config = config_of(case)
    linear = LinearAttention(
        key_heads=config["linear_num_key_heads"],
        value_heads=config["linear_num_value_heads"],
        key_dim=config["linear_key_head_dim"],
        value_dim=config["linear_value_head_dim"],
        kernel=2,
        interval=4,
    )
    source = describe_source(tiny(family="qwen3_5_moe_text", linear=linear), f"tp={tp}", ["h"] * tp)
    names = {f"{DELTA}in_proj_{n}.weight": n for n in ("qkv", "z", "b", "a")}
    for rank, share in enumerate(np.split(arrays[f"{case}/in_proj"], tp)):
        np.testing.assert_array_equal(ids(source, arrays, separate, names, rank), np.sort(share.ravel()))


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engines_convolution_has_its_heads_of_query_key_and_value(arrays, tp):
    linear = LinearAttention(key_heads=4, value_heads=8, key_dim=2, value_dim=2, kernel=2, interval=4)
    model = tiny(family="qwen3_5_moe_text", linear=linear)
    sink = describe_sink(model, f"tp={tp}", ["h"] * tp, "bf16")
    name = f"{DELTA}conv1d.weight"
    (first,) = [offset_of(model, t) for t in model.tensors if t.name == name]
    for rank, local in enumerate(arrays[f"vllm_gdn_conv1d_tp{tp}/local"]):
        np.testing.assert_array_equal(memory(sink.ranks[rank], model.tensors)[name][1] - first, local.ravel())


def offset_of(model, tensor):
    """The number that `memory` counts a tensor's first element with, where all recipes have one part."""
    before = model.tensors[: model.tensors.index(tensor)]
    return sum(int(np.prod(t.shape)) for t in before)


QKV = [
    *((8, 2, 4, tp) for tp in (1, 2, 4)),
    *((16, 4, 128, tp) for tp in (1, 2, 4)),
    *((8, 8, 4, tp) for tp in (1, 8)),
]


def numbered(arrays, case, kinds, model, stem, recipe=None, step=1):
    """Elements as `memory` counts them -> the numbers that the vectors have."""
    from wsync.spec.recipes import recipe_parts

    found, base = {}, 0
    for tensor in model.tensors:
        for part in recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe(tensor) if recipe else "bf16"):
            kind = next((k for k in kinds if tensor.name == f"{stem}{k}_proj.weight"), None)
            size = int(np.prod(part.shape))
            if kind is not None:
                numbers = arrays[f"{case}/{kind}"].ravel()[:: step if part.role == "scale" else 1]
                found.update(zip(range(base, base + size), numbers[:size].tolist(), strict=True))
            base += size
    return found


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "tp"), QKV)
def test_an_engines_fused_projection_replicates_key_value_heads_as_vllm_does(arrays, heads, kv_heads, head_dim, tp):
    case = f"vllm_qkv_H{heads}_kv{kv_heads}_d{head_dim}_tp{tp}"
    model = tiny(heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=1)
    numbers = numbered(arrays, case, ("q", "k", "v"), model, ATTENTION)
    sink = describe_sink(model, f"tp={tp}", ["h"] * tp, "bf16")
    for rank, local in enumerate(arrays[f"{case}/local"]):
        found = memory(sink.ranks[rank], model.tensors)[f"{ATTENTION}qkv_proj.weight"][1]
        assert [numbers[i] for i in found.tolist()] == local.ravel().tolist()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_scales_of_blocks_lie_as_vllm_puts_them(arrays, tp):
    case = f"vllm_qkv_H16_kv4_d128_tp{tp}"
    model = tiny(heads=16, kv_heads=4, head_dim=128, hidden=1, intermediate=512)
    sink = describe_sink(model, f"tp={tp}", ["h"] * tp, "fp8_block128")
    recipes = sink.ranks[0].recipes
    numbers = numbered(arrays, case, ("q", "k", "v"), model, ATTENTION, lambda t: recipes.get(t.name, "bf16"), step=128)
    for rank, local in enumerate(arrays[f"{case}/block_scale_local"]):
        found = memory(sink.ranks[rank], model.tensors)[f"{ATTENTION}qkv_proj.weight_scale_inv"][1]
        assert [numbers[i] for i in found.tolist()] == local.ravel().tolist()


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_has_gate_and_up_one_behind_the_other(arrays, tp):
    case, mlp = f"vllm_gate_up_tp{tp}", "model.layers.0.mlp."
    model = tiny(hidden=1)
    numbers = numbered(arrays, case, ("gate", "up"), model, mlp)
    sink = describe_sink(model, f"tp={tp}", ["h"] * tp, "bf16")
    for rank, local in enumerate(arrays[f"{case}/local"]):
        found = memory(sink.ranks[rank], model.tensors)[f"{mlp}gate_up_proj.weight"][1]
        assert [numbers[i] for i in found.tolist()] == local.ravel().tolist()


def test_an_engines_vocabulary_is_padded_as_vllms(arrays):
    worlds = defaultdict(dict)
    for vocab, tp, rank, start, end, rows in arrays["vllm_vocab/rows"].tolist():
        worlds[vocab, tp][rank] = start, end, rows
    for (vocab, tp), shares in worlds.items():
        model = plain("model.embed_tokens.weight", vocab, 1)
        if -1 in shares:
            with pytest.raises(ConfigError, match=f"which tp={tp} does not divide"):
                describe_sink(model, f"tp={tp}", ["h"] * tp, "bf16")
            continue
        sink = describe_sink(model, f"tp={tp}", ["h"] * tp, "bf16")
        for rank, (start, end, rows) in shares.items():
            found = memory(sink.ranks[rank], model.tensors).get("model.embed_tokens.weight", ("", np.zeros(0)))[1]
            assert found[found >= 0].tolist() == list(range(start, end))
            assert end <= start or (len(found) == rows and (found[: end - start] >= 0).all())


def test_experts_are_on_the_ranks_that_vllm_maps_them_to(arrays):
    slots = defaultdict(dict)
    for experts, ep, round_robin, rank, expert, slot in arrays["vllm_expert_map/rows"].tolist():
        if slot >= 0:
            slots[experts, ep, round_robin, rank][slot] = expert
    for (experts, ep, round_robin, rank), found in slots.items():
        placement = "round_robin" if round_robin else "linear"
        assert experts_of_rank(experts, rank, ep, placement) == [found[slot] for slot in range(len(found))]


def test_zero3_ranks_hold_the_ranges_of_deepspeeds_formula(arrays):
    for numel, world, rank, start, length, _ in arrays["zero3/rows"].tolist():
        source = describe_source(plain("a.weight", numel), f"zero3={world}", ["h"] * world)
        assert held(source, "a.weight", rank).tolist() == list(range(start, start + length))


def test_fsdp_ranks_hold_the_rows_of_torchs_chunks(arrays):
    for rows, world, rank, start, length in arrays["fsdp2_uneven/rows"].tolist():
        source = describe_source(plain("a.weight", rows), f"fsdp={world}", ["h"] * world)
        assert held(source, "a.weight", rank).tolist() == list(range(start, start + length))


def test_fsdp_over_tensor_parallel_cuts_for_tensor_parallelism_first(arrays):
    name = f"{ATTENTION}q_proj.weight"
    for rows, dp, tp, dp_rank, tp_rank, start, length in arrays["fsdp2_tp_strided/rows"].tolist():
        source = describe_source(plain(name, rows, 1), f"fsdp={dp},tp={tp}", ["h"] * (dp * tp))
        assert held(source, name, dp_rank * tp + tp_rank).tolist() == list(range(start, start + length))
