"""vLLM engines as they start from checkpoints: what the proofs of a publish are compared with must itself be sound."""

import numpy as np
import pytest
import torch

from vllm_cpu import models
from vllm_cpu.harness import Difference, EngineError, Held, compare_dumps

pytestmark = pytest.mark.multiproc

# The same in every version: made from the configuration, not from weights.
CONSTANTS = ("cos_sin_cache", "_k_scale", "_v_scale", "_q_scale", "_prob_scale", "_k_scale_cpu", "_v_scale_cpu")
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}

deep = pytest.mark.deep
QUICK = [("llama", 1, "native"), ("gptoss", 1, "native"), ("dsv3", 1, "native"), ("qwen3moe", 2, "native")]
EVERY = [
    pytest.param(family, tp, cpu, id=f"{family}-tp{tp}-{cpu}", marks=() if (family, tp, cpu) in QUICK else deep)
    for cpu in ("native", "avx2")
    for tp in (1, 2)
    for family in models.FAMILIES
    if family != "qwen3_wide"
]


def weights_of(dump):
    """All that a version changes. (A bias that is added on rank 0 alone is zero on the others.)"""
    return {n: h for n, h in dump.items() if h.data.any() and not n.endswith(CONSTANTS)}


def as_bf16(held):
    return torch.from_numpy(held.data.copy()).view(torch.bfloat16).as_strided(held.shape, held.stride)


@pytest.mark.parametrize(("family", "tp", "cpu"), EVERY)
def test_two_fresh_engines_of_a_checkpoint_hold_and_say_the_same(lab, family, tp, cpu):
    first = lab.fresh(family, 1, tp=tp, cpu=cpu)
    assert {n.split("/")[0] for n in first.dump} == {f"rank{r}" for r in range(tp)}
    with lab.engine(family, 1, tp=tp, cpu=cpu) as engine:
        assert engine.generate() == first.outputs
        assert compare_dumps(first.dump, engine.dump()) == []


@pytest.mark.parametrize(("family", "tp", "cpu"), EVERY)
def test_engines_of_two_versions_differ_in_every_weight_and_in_what_they_say(lab, family, tp, cpu):
    one, two = lab.fresh(family, 1, tp=tp, cpu=cpu), lab.fresh(family, 2, tp=tp, cpu=cpu)
    differences = {d.name: d for d in compare_dumps(one.dump, two.dump)}
    # Scales of a few blocks are powers of two, and may well be the same or differ in one byte.
    few = {name for name, held in one.dump.items() if name.endswith("weight_scale_inv") and held.data.size <= 32}
    assert (weights_of(one.dump).keys() ^ differences.keys()) - few == set()
    assert [
        str(d) for name, d in differences.items() if name not in few and d.differing_bytes < 0.1 * d.num_bytes
    ] == []
    for a, b in zip(one.outputs, two.outputs, strict=True):
        assert a["token_ids"] != b["token_ids"]
        assert max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)) > 0.05


@pytest.mark.parametrize(
    ("family", "cpu"),
    [("llama", "native"), ("dsv3", "native"), *(pytest.param(f, "avx2", marks=deep) for f in ("qwen2", "mixtral"))],
)
def test_what_a_kernel_packed_is_read_back_as_the_fused_weight_of_the_checkpoint(lab, family, cpu):
    trained = models.tensors(family, 1)
    packed = {n: h for n, h in lab.fresh(family, 1, cpu=cpu).dump.items() if h.kind == "packed"}
    assert len(packed) >= 8
    for name, held in packed.items():
        layer = name.removeprefix("rank0/").removesuffix(".cpu_linear")
        parent, _, last = layer.rpartition(".")
        parts = [
            trained[f"{parent}.{part}.weight" if parent else f"{part}.weight"] for part in FUSED.get(last, (last,))
        ]
        assert torch.equal(as_bf16(held), torch.cat(parts)), name


def test_the_avx2_flavour_loads_the_avx2_kernels_and_keeps_linear_weights_in_place(lab):
    dump = lab.fresh("llama", 1, cpu="avx2").dump
    linear = [n for n in dump if n.endswith("_proj.weight")]
    assert len(linear) == 8
    for name in linear:
        assert np.array_equal(dump[name].data, dump[name.replace(".weight", ".cpu_linear")].data)
    with lab.engine("llama", 1, tp=2, cpu="avx2") as engine:
        assert engine.kernel_libraries() == [["_C_AVX2.abi3.so"]] * 2


def test_a_dump_has_what_layers_refer_to_besides_their_parameters(lab):
    kinds = {n.removeprefix("rank0/"): h.kind for n, h in lab.fresh("gptoss", 1).dump.items()}
    assert kinds["model.layers.0.attn.sinks"] == "parameter"
    assert kinds["model.layers.0.attn.attn.impl.sinks"] == "attribute"
    assert kinds["model.layers.0.attn.qkv_proj.cpu_linear"] == "packed"
    kinds = {n.removeprefix("rank0/"): h.kind for n, h in lab.fresh("dsv3", 1).dump.items()}
    assert kinds["model.layers.1.mlp.experts.router.e_score_correction_bias"] == "attribute"
    assert kinds["model.layers.0.self_attn.mla_attn.mla_attn.W_UK_T"] == "parameter"


def test_a_dump_comparison_counts_bytes_and_names_layouts_and_what_is_missing():
    def held(data, shape=(4,)):
        return Held("parameter", "torch.uint8", shape, (1,), np.array(data, np.uint8))

    a = {"same": held([1, 2, 3, 4]), "changed": held([1, 2, 3, 4]), "shaped": held([1, 2, 3, 4]), "gone": held([1])}
    b = {"same": held([1, 2, 3, 4]), "changed": held([1, 0, 3, 0]), "shaped": held([1, 2, 3, 4], (2, 2))}
    changed, gone, shaped = compare_dumps(a, b)
    assert changed == Difference("changed", 2, 4)
    assert str(gone) == "gone: 1 of 1 bytes, in one dump alone"
    assert "(4,)" in str(shaped)
    assert "(2, 2)" in str(shaped)


def test_the_comparison_sees_the_experts_that_vllms_own_reload_leaves_unpacked(lab):
    with lab.engine("qwen3moe", 0, backend="test_reload") as engine:
        engine.call("init_weight_transfer_engine", {"init_info": {}})
        engine.call("start_weight_update")
        file = str(lab.model("qwen3moe", 1) / "model.safetensors")
        engine.call("update_weights", {"update_info": {"file": file}})
        engine.call("finish_weight_update", "1")
        engine.generate()
        differences = compare_dumps(lab.fresh("qwen3moe", 1).dump, engine.dump())
        assert engine.call("get_weight_version") == "1"
    experts = "rank0/model.layers.{}.mlp.experts.routed_experts.{}_weight"
    assert {d.name for d in differences} >= {experts.format(i, w) for i in (0, 1) for w in ("w13", "w2")}


def test_an_error_in_an_engine_is_raised_here_with_its_kind_and_the_engines_log(lab):
    with lab.engine("llama", 1) as engine:
        with pytest.raises(EngineError, match="no_such_method") as caught:
            engine.call("no_such_method")
        assert caught.value.kind == "AttributeError"
        assert engine.generate(["x"], 2) != []
        engine.kill()
        with pytest.raises(EngineError, match=r"engine\.log") as caught:
            engine.generate(["x"], 2)
        assert caught.value.kind == "Ended"
    with pytest.raises(EngineError, match="1000000"):
        lab.engine("llama", 1, extra={"max_model_len": 1_000_000})
