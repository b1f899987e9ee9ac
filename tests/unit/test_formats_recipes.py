"""The reference arithmetic of every recipe: against other projects' quantisers, and by its properties."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsync.errors import DtypeMismatchError, NonFiniteError, RecipeError, ShapeMismatchError
from wsync.formats import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    dequantize_reference,
    quantize_reference,
    requantize_e8m0_reference,
)
from wsync.formats.e2m1 import unpack_codes
from wsync.spec.recipes import RECIPES, get_recipe, recipe_parts

QUANTISED = tuple(name for name, facts in RECIPES.items() if facts.quantised)
NEW = ("fp8_channel", "fp8_tensor", "mxfp8", "nvfp4")
VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
beside_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")

SOURCES = {
    "fp8_block128": ("deepseek-ai/DeepGEMM", "per_block_cast_to_fp8.ue8m0=True", ("q", "scale"), 2),
    "fp8_block128_f32": ("vllm-project/vllm", "per_block_cast_to_fp8.f32scale", ("q", "scale"), 2),
    "fp8_channel": ("vllm-project/vllm", "online_ptpc", ("q", "weight_scale"), 4),
    "fp8_tensor": ("sgl-project/sglang", "input_to_float8", ("q", "scale_inv"), 2),
    "mxfp8": ("pytorch/ao", "to_mx.e4m3.RCEIL", ("q", "scale_e8m0"), 2),
    "nvfp4": ("NVIDIA/Model-Optimizer", "nvfp4", ("weight_packed", "weight_scale_e4m3", "weight_scale_2"), 2),
}


def raw(part: Tensor) -> bytes:
    return part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_parts(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def facts(parts: dict[str, Tensor]) -> list[tuple[object, ...]]:
        return [(name, part.dtype, part.shape, raw(part)) for name, part in parts.items()]

    return facts(a) == facts(b)


def every_bf16() -> Tensor:
    """All finite bf16 values, ``[255, 256]``."""
    bits = np.arange(0x10000, dtype=np.uint32)
    finite = bits[(bits & 0x7FFF) < 0x7F80].astype(np.uint16)
    return torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).reshape(255, 256)


def wild(seed: int, shape: tuple[int, ...]) -> Tensor:
    """f32 values of many magnitudes, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1)) * 5) * 0.02
    values[rng.random(shape) < 0.05] = 0.0
    return torch.from_numpy(np.where(rng.random(shape) < 0.1, -0.0, values).astype(np.float32))


@beside_vectors
@pytest.mark.parametrize("recipe", QUANTISED)
def test_recipes_equal_the_quantisers_of_other_projects(recipe):
    index, blobs = json.loads((VECTORS / "index.json").read_text()), np.load(VECTORS / "vectors.npz")
    repo, name, outputs, num_cases = SOURCES[recipe]
    compared = 0
    for entry in index["entries"]:
        if (entry["repo"], entry["id"], entry["mode"]) != (repo, name, "cpu") or "nonfinite" in entry["input"]:
            continue
        bits = torch.from_numpy(blobs[index["inputs"][entry["input"]]["blob"]])
        weight = bits.view(torch.bfloat16) if bits.dtype == torch.int16 else bits
        parts = quantize_reference(weight, recipe)
        for part, output in zip(parts.values(), outputs, strict=True):
            facts = entry["outputs"][output]
            dtype = str(part.dtype).removeprefix("torch.")
            assert facts["dtype"] == dtype or (dtype == "uint8" and facts["dtype"] == "float8_e8m0fnu")
            assert tuple(part.shape) == tuple(facts["shape"])
            assert raw(part) == blobs[facts["blob"]].tobytes(), (entry["input"], output)
        compared += 1
    assert compared == num_cases


@beside_vectors
def test_requantisation_equals_that_of_vllm():
    index, blobs = json.loads((VECTORS / "index.json").read_text()), np.load(VECTORS / "vectors.npz")
    compared = 0
    for entry in index["entries"]:
        if (entry["repo"], entry["id"]) != ("vllm-project/vllm", "requant_weight_ue8m0_inplace"):
            continue
        codes, scales, *expected = (blobs[entry["outputs"][o]["blob"]] for o in ("q_in", "s_in", "q", "scale"))
        got = requantize_e8m0_reference(torch.from_numpy(codes), torch.from_numpy(scales))
        assert [raw(part) for part in got] == [array.tobytes() for array in expected], entry["input"]
        compared += 1
    assert compared == 4  # two inputs, in two modes


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 150),
    batch=st.sampled_from([(), (2,)]),
    recipe=st.sampled_from(["fp8_block128", "fp8_block128_f32"]),
    seed=st.integers(0, 99),
)
def test_requantisation_keeps_the_values_of_power_of_two_scales_and_settles(rows, cols, batch, recipe, seed):
    parts = quantize_reference(wild(seed, (*batch, rows, cols)), recipe)
    if recipe == "fp8_block128_f32":  # may round a block's largest code down to 224, which fits half of the scale
        parts = dict(zip(parts, requantize_e8m0_reference(*parts.values()), strict=True))
    mantissas, _ = torch.frexp(parts["weight_scale_inv"])
    assert bool((mantissas == 0.5).all())
    once = dict(zip(parts, requantize_e8m0_reference(*parts.values()), strict=True))
    assert torch.equal(dequantize_reference(once, recipe), dequantize_reference(parts, recipe))
    assert same_parts(dict(zip(parts, requantize_e8m0_reference(*once.values()), strict=True)), once)


def test_requantisation_halves_the_scale_of_a_block_whose_largest_code_is_224():
    weight = torch.zeros(128, 256, dtype=torch.bfloat16)
    weight[:, :128], weight[:, 128:] = 230.0, 250.0  # 230 rounds to 224
    parts = quantize_reference(weight, "fp8_block128")
    assert parts["weight_scale_inv"].tolist() == [[1.0, 1.0]]
    codes, scales = requantize_e8m0_reference(*parts.values())
    assert scales.tolist() == [[0.5, 1.0]]
    assert decode_e4m3(codes)[0, ::128].tolist() == [448.0, 256.0]


def test_requantisation_refuses_what_decodes_to_no_number():
    codes, scales = torch.zeros(3, 200, dtype=torch.uint8), torch.ones(1, 2)
    codes[2, 130] = 0x7F
    with pytest.raises(NonFiniteError, match=r"element \(2, 130\) is nan"):
        requantize_e8m0_reference(codes.view(torch.float8_e4m3fn), scales)
    with pytest.raises(ShapeMismatchError, match=r"\(1, 2\).*\(1, 1\)"):
        requantize_e8m0_reference(codes, scales[:, :1])


def by_numpy(weight: np.ndarray, recipe: str) -> list[bytes]:
    """The rules once more in numpy and with torch's own e4m3 cast, for one f32 matrix of ordinary values."""
    one, top = np.float32(1), np.float32(448)
    magnitude = np.abs(weight)

    def e4m3(values: np.ndarray) -> bytes:
        return raw(torch.from_numpy(np.clip(values, -top, top)).to(torch.float8_e4m3fn))

    if recipe == "fp8_channel":
        scale = np.maximum(magnitude.max(axis=1, keepdims=True) / top, np.float32(1 / (448 * 512)))
        return [e4m3(weight / scale), scale.tobytes()]
    if recipe == "fp8_tensor":
        r = (one / np.maximum(magnitude.max(), np.float32(1e-12))) * top
        return [e4m3(weight * r), np.float32(one / r).tobytes()]
    if recipe == "mxfp8":
        groups = magnitude.reshape(len(weight), -1, 32).max(axis=2) / top
        mantissa, exponent = np.frexp(groups)
        exponent = exponent - (mantissa == 0.5)
        scaled = np.ldexp(weight, -np.repeat(exponent, 32, axis=1))
        return [e4m3(scaled), (exponent + 127).astype(np.uint8).tobytes()]
    scale_2 = magnitude.max() / np.float32(2688)
    groups = magnitude.reshape(len(weight), -1, 16).max(axis=2) / (np.float32(6) * scale_2)
    scale = torch.from_numpy(np.clip(groups, 2.0**-9, top).astype(np.float32)).to(torch.float8_e4m3fn)
    quotient = weight / np.repeat(scale.to(torch.float32).numpy() * scale_2, 16, axis=1)
    thresholds = [(0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5, False)]
    code = sum((np.abs(quotient) >= t if even else np.abs(quotient) > t).astype(np.uint8) for t, even in thresholds)
    code = code | ((quotient < 0).astype(np.uint8) << 3)
    return [(code[:, ::2] | code[:, 1::2] << 4).tobytes(), raw(scale), scale_2.tobytes()]


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 6), recipe=st.sampled_from(NEW), seed=st.integers(0, 999))
def test_references_equal_the_rules_written_down_a_second_time(rows, groups, recipe, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, 32 * groups)) * np.exp(rng.standard_normal((rows, 1)) * 2)).astype(np.float32)
    parts = quantize_reference(torch.from_numpy(weight), recipe)
    assert [raw(part) for part in parts.values()] == by_numpy(weight, recipe)


@pytest.mark.parametrize("recipe", QUANTISED)
def test_every_finite_bf16_is_taken_and_comes_back_finite_with_its_sign(recipe):
    weight = every_bf16()
    parts = quantize_reference(weight, recipe)
    assert same_parts(parts, quantize_reference(weight.to(torch.float32), recipe))
    codes = parts["weight"] if recipe != "nvfp4" else unpack_codes(parts["weight"])
    values = decode_e2m1(codes) if recipe == "nvfp4" else decode_e4m3(codes)
    assert bool(torch.isfinite(values).all())
    assert bool((values * weight.to(torch.float32).sign() >= 0).all())
    if recipe != "nvfp4":  # e4m3 keeps the sign of every zero
        assert torch.equal(torch.signbit(values), torch.signbit(weight))
    decoded = dequantize_reference(parts, recipe)  # a code that was rounded up can pass the largest f32
    assert bool(torch.isfinite(decoded[weight.abs() <= 2.0**127]).all())


def element_scales(parts: dict[str, Tensor], recipe: str, shape: tuple[int, ...]) -> Tensor:
    """f64: the multiplier of each weight."""
    facts, scales = get_recipe(recipe), list(parts.values())[1:]
    first = decode_e8m0(scales[0]) if recipe == "mxfp8" else scales[0].to(torch.float32)
    out = first.to(torch.float64)
    if recipe == "fp8_tensor":
        out = out[..., None, None]
    rows, cols = facts.levels[0].cell(shape)
    out = out.repeat_interleave(rows, -2).repeat_interleave(cols, -1)[..., : shape[-2], : shape[-1]]
    return out * scales[1].to(torch.float64)[..., None] if recipe == "nvfp4" else out


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150),
    groups=st.integers(1, 5),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    recipe=st.sampled_from(QUANTISED),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_decoded_weights_are_within_half_a_step_of_the_given_ones(rows, groups, batch, recipe, dtype, seed):
    weight = wild(seed, (*batch, rows, 32 * groups)).clamp(-6e4, 6e4).to(dtype)
    parts = quantize_reference(weight, recipe)
    declared = recipe_parts("weight", tuple(weight.shape), "bfloat16", recipe)
    assert [(n, str(p.dtype), tuple(p.shape)) for n, p in parts.items()] == [
        (p.name, f"torch.{p.dtype}", p.shape) for p in declared
    ]
    given, scale = weight.to(torch.float64), element_scales(parts, recipe, tuple(weight.shape))
    error = (dequantize_reference(parts, recipe).to(torch.float64) - given).abs()
    relative, least, largest = (2.0**-2, 0.25, 6.0) if recipe == "nvfp4" else (2.0**-4, 2.0**-10, 448.0)
    bound = torch.maximum(given.abs() * relative, scale * least) * (1 + 1e-5)
    if recipe == "nvfp4":  # the block's own scale was rounded: down by a sixteenth, or by half a step of e4m3's least
        shortfall = parts["weight_scale_2"].to(torch.float64)[..., None] * (6 * 2.0**-10)
        cut_off = torch.maximum(given.abs() * 2.0**-4, shortfall) * (1 + 1e-5)
        bound = torch.where(given.abs() > largest * scale, torch.maximum(bound, cut_off), bound)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_refused_with_its_first_index(recipe, value):
    weight = torch.ones(2, 3, 70, 64)
    weight[1, 2, 0, 0] = value
    weight[1, 0, 69, 63] = value
    with pytest.raises(NonFiniteError, match=r"\(1, 0, 69, 63\)") as caught:
        quantize_reference(weight, recipe)
    assert recipe in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0, 0), (2, 0, 32), (0, 4, 32)])
def test_empty_weights_have_parts_of_the_declared_shapes(recipe, shape):
    parts = quantize_reference(torch.zeros(shape), recipe)
    declared = recipe_parts("weight", shape, "float32", recipe)
    assert {n: tuple(p.shape) for n, p in parts.items()} == {p.name: p.shape for p in declared}
    assert dequantize_reference(parts, recipe).shape == shape


def test_zero_tiny_and_subnormal_values_follow_each_rule():
    least = np.float32(1 / (448 * 512))
    rows = torch.zeros(5, 32)
    rows[1], rows[2, 0], rows[3, 0], rows[4, 0] = -0.0, 1e-7, 2.0**-149, -(2.0**-120)
    parts = quantize_reference(rows, "fp8_channel")
    assert parts["weight_scale"].flatten().tolist() == [least] * 5
    assert parts["weight"].view(torch.uint8)[:, 0].tolist() == [0, 0x80, int(np.round(1e-7 / least * 512)), 0, 0x80]

    parts = quantize_reference(rows, "mxfp8")
    assert parts["weight_scale"].flatten().tolist() == [0, 0, 95, 0, 0]  # 1e-7 / 448 is just below 2^-32
    assert parts["weight"].view(torch.uint8)[:, 0].tolist()[:2] == [0, 0x80]
    assert decode_e4m3(parts["weight"])[4, 0] == -(2.0**7)
    assert dequantize_reference(parts, "mxfp8")[4, 0] == -(2.0**-120)

    zero = quantize_reference(rows[:2], "fp8_tensor")
    assert zero["weight_scale"] == np.float32(1) / ((np.float32(1) / np.float32(1e-12)) * np.float32(448))
    assert raw(zero["weight"]) == bytes(32) + b"\x80" * 32

    zero = quantize_reference(rows[:2], "nvfp4")
    assert (zero["weight_scale_2"].tolist(), set(raw(zero["weight_scale"])), set(raw(zero["weight"]))) == (
        [1.0],
        {0x38},
        {0},
    )
    tiny = rows.clone()
    tiny[0, :] = 2688.0
    parts = quantize_reference(tiny, "nvfp4")  # scale_2 is 1: values far below it round to zero and keep their sign
    assert parts["weight_scale_2"].tolist() == [1.0]
    assert raw(parts["weight_scale"]) == bytes([0x7E, 0x7E, 0x38, 0x38, 0x01, 0x38, 0x38, 0x38, 0x01, 0x38])
    assert unpack_codes(parts["weight"])[:, 0].tolist() == [7, 0, 0, 0, 8]

    subnormal = torch.full((1, 16), 2.0**-149)  # scale_2 underflows: 1
    parts = quantize_reference(subnormal, "nvfp4")
    assert (parts["weight_scale_2"].tolist(), raw(parts["weight_scale"]), raw(parts["weight"])) == (
        [1.0],
        b"\x38",
        bytes(8),
    )


@pytest.mark.parametrize("recipe", ["fp8_tensor", "nvfp4"])
def test_a_scale_group_encodes_its_members_as_one_matrix(recipe):
    q, k, v = (
        torch.from_numpy(np.random.default_rng(i).standard_normal((48, 64)).astype(np.float32)) for i in range(3)
    )
    k *= 3
    fused = quantize_reference(torch.cat([q, k, v]), recipe)
    amax = torch.cat([q, k, v]).abs().max()
    alone = [quantize_reference(m, recipe, amax=amax) for m in (q, k, v)]
    assert raw(fused["weight"]) == b"".join(raw(parts["weight"]) for parts in alone)
    last = list(fused)[-1]
    assert {raw(parts[last]) for parts in alone} == {raw(fused[last])}
    assert not same_parts(alone[0], quantize_reference(q, recipe))
    experts = torch.stack([q, q * 2])
    own = quantize_reference(experts, recipe)
    assert same_parts(own, quantize_reference(experts, recipe, amax=experts.abs().amax(dim=(1, 2))))
    shared = quantize_reference(experts, recipe, amax=float(experts.abs().max()))
    assert raw(shared["weight"][1]) == raw(own["weight"][1])
    assert not same_parts(shared, own)


def test_an_amax_that_no_scale_group_can_have_is_refused_with_both_values():
    weight = torch.full((2, 4, 32), 2.0)
    for recipe, amax, says in (
        ("fp8_tensor", 1.0, r"at least the weight's own, 2\.0, but matrix \(0,\) has 1\.0"),
        ("nvfp4", torch.tensor([2.0, float("inf")]), r"matrix \(1,\) has inf"),
        ("nvfp4", torch.tensor([2.0, float("nan")]), r"matrix \(1,\) has nan"),
        ("nvfp4", torch.ones(3), r"shape \(2,\), but it is \(3,\)"),
        ("mxfp8", 1.0, "'mxfp8' takes no amax"),
        ("bf16", 1.0, "'bf16' takes no amax"),
    ):
        with pytest.raises(RecipeError, match=says):
            quantize_reference(weight, recipe, amax=amax)


def test_what_a_recipe_cannot_encode_or_decode_is_refused_with_both_values():
    with pytest.raises(RecipeError, match=r"multiple of 32, but the weight has shape \(4, 48\)"):
        quantize_reference(torch.zeros(4, 48), "mxfp8")
    with pytest.raises(RecipeError, match=r"multiple of 16, but the weight has shape \(4, 24\)"):
        quantize_reference(torch.zeros(4, 24), "nvfp4")
    with pytest.raises(RecipeError, match=r"2 or more dimensions, but the weight has shape \(4,\)"):
        quantize_reference(torch.zeros(4), "fp8_tensor")
    parts = quantize_reference(torch.ones(4, 32), "nvfp4")
    for change, error, says in (
        ({"weight": parts["weight"].to(torch.float32)}, DtypeMismatchError, "uint8, but this one is torch.float32"),
        ({"weight": parts["weight"][:, :4]}, ShapeMismatchError, "multiple of 16 columns, but this one has 8"),
        ({"weight_scale": parts["weight_scale"][:, :1]}, ShapeMismatchError, r"\(4, 2\).*\(4, 1\)"),
        ({"weight_scale_2": torch.ones(())}, ShapeMismatchError, r"\(1,\).*\(\)"),
        ({"weight_scale_2": torch.ones(1, dtype=torch.float64)}, DtypeMismatchError, "float32.*float64"),
    ):
        with pytest.raises(error, match=says):
            dequantize_reference({**parts, **change}, "nvfp4")
    del parts["weight_scale_2"]
    with pytest.raises(RecipeError, match="'weight_scale_2' is not in"):
        dequantize_reference(parts, "nvfp4")


@pytest.mark.parametrize("recipe", QUANTISED)
def test_parts_kept_as_bytes_decode_like_parts_of_their_own_dtype(recipe):
    weight = wild(5, (2, 40, 64))
    parts = quantize_reference(weight, recipe)
    kept = {n: p.view(torch.uint8) if p.element_size() == 1 else p for n, p in parts.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = dequantize_reference(kept, recipe, dtype)
        assert torch.equal(got, dequantize_reference(parts, recipe).to(dtype))
    transposed = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert same_parts(quantize_reference(transposed, recipe), parts)
