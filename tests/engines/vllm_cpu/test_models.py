"""The tiny checkpoints that the engines' tests are made of. No engine runs here."""

import json

import pytest
import torch

import wsync
from vllm_cpu import models

pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_versions_differ_in_every_tensor_and_are_drawn_alike_again(family):
    first, again, other = models.tensors(family, 1), models.tensors(family, 1), models.tensors(family, 2)
    assert list(first) == list(again) == list(other)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert (tensor != other[name]).float().mean() > 0.8, name
        assert tensor.unique().numel() > 0.1 * min(tensor.numel(), 1000), name


def test_correction_biases_are_f32_as_transformers_holds_them_and_the_rest_is_bf16():
    in_f32 = {name for name, tensor in models.tensors("dsv3", 0).items() if tensor.dtype == torch.float32}
    assert in_f32 == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert {t.dtype for t in models.tensors("gptoss", 0).values()} == {torch.bfloat16}


def test_experts_have_the_names_of_the_saved_file():
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in models.tensors("qwen3moe", 0)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in models.tensors("mixtral", 0)
    assert models.tensors("gptoss", 0)["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 128, 512)
    assert "lm_head.weight" not in models.tensors("qwen3_tied", 0)


def test_a_quantised_checkpoint_holds_the_parts_that_wsync_makes(tmp_path):
    folder = models.checkpoint("qwen3_fp8", 3, tmp_path)
    assert folder == models.checkpoint("qwen3_fp8", 3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    held = safetensors_torch.load_file(folder / "model.safetensors")
    trained = models.tensors("qwen3_fp8", 3)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert held[name].dtype == torch.float8_e4m3fn
    assert held[f"{name}_scale_inv"].shape == (2, 4)
    parts = {"weight": held[name], "weight_scale_inv": held[f"{name}_scale_inv"]}
    torch.testing.assert_close(
        wsync.dequantize(parts, "fp8_block128"),
        trained[name].float(),
        rtol=1 / 16,
        atol=float(trained[name].std()) / 64,
    )
    assert torch.equal(held["model.embed_tokens.weight"], trained["model.embed_tokens.weight"])
    assert set(held) == set(trained) | {f"{n}_scale_inv" for n in trained if models.is_quantized(n)}
