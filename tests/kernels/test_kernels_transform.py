"""Staged codes by value: dequantised to floats, and requantised to power-of-two scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import ISAS, finite_bf16, raw_bytes
from torch import Tensor

from wsync import kernels
from wsync.errors import ConfigError
from wsync.formats import dequantize_reference, quantize_reference, requantize_e8m0_reference
from wsync.plan.descriptors import (
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_CHANNEL,
    OP_FP8_SCALED,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
    SRC_BF16,
    SRC_F16,
    SRC_F32,
    TRANSFORM_DEQUANTISE,
    TRANSFORM_DESC,
    TRANSFORM_REQUANT_E8M0,
)

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
OPS = {
    "fp8_block128": OP_FP8_BLOCK128,
    "fp8_block128_f32": OP_FP8_BLOCK128_F32,
    "fp8_channel": OP_FP8_CHANNEL,
    "fp8_tensor": OP_FP8_TENSOR,
    "mxfp8": OP_MXFP8,
    "nvfp4": OP_NVFP4,
}
DST_OF = {torch.bfloat16: SRC_BF16, torch.float16: SRC_F16, torch.float32: SRC_F32}


def dequantise_desc(parts: list[Tensor], recipe: str, dst: Tensor, phase: tuple[int, int] = (0, 0)) -> np.ndarray:
    """``parts`` begin at the first element of the box and may be strided by rows."""
    desc = np.zeros(1, TRANSFORM_DESC)
    desc["codes"], desc["code_stride"] = parts[0].data_ptr(), parts[0].stride(0)
    desc["extent"] = tuple(dst.shape)
    desc["scales"] = parts[1].data_ptr()
    desc["scale_stride"] = parts[1].stride(0) if parts[1].dim() else 0
    if len(parts) > 2:
        desc["tensor_scale"] = parts[2].data_ptr()
    desc["dst"], desc["dst_stride"] = dst.data_ptr(), dst.stride()
    desc["row_phase"], desc["col_phase"] = phase
    desc["recipe_op"], desc["op"], desc["dst_dtype"] = OPS[recipe], TRANSFORM_DEQUANTISE, DST_OF[dst.dtype]
    return desc


def requantise_desc(codes: Tensor, scales: Tensor, dst: Tensor, dst_scales: Tensor) -> np.ndarray:
    desc = dequantise_desc([codes, scales], "fp8_block128_f32", dst.view(torch.uint8).to(torch.float32))
    desc["dst"], desc["dst_stride"] = dst.data_ptr(), dst.stride()
    desc["dst_scales"], desc["dst_scale_stride"] = dst_scales.data_ptr(), dst_scales.stride(0)
    desc["op"], desc["piece_idx"] = TRANSFORM_REQUANT_E8M0, 4
    return desc


@settings(max_examples=50, deadline=None)
@given(
    recipe=st.sampled_from(sorted(OPS)),
    rows=st.integers(1, 140),
    groups=st.one_of(st.integers(1, 12), st.just(36)),
    dtype=st.sampled_from(sorted(DST_OF, key=str)),
    style=st.sampled_from(["normal", "wild", "sparse"]),
    cut=st.tuples(st.integers(0, 130), st.integers(0, 8)),
    turned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_part_of_a_matrix_is_dequantised_as_the_reference_does(
    recipe, rows, groups, dtype, style, cut, turned, seed
):
    weight = finite_bf16(np.random.default_rng(seed), (rows, 32 * groups), style)
    parts = list(quantize_reference(weight, recipe).values())
    row, col = min(cut[0], rows - 1), 32 * min(cut[1], groups - 1)
    want = dequantize_reference(dict(zip(_names(recipe), parts, strict=True)), recipe, dtype)[row:, col:]
    codes = parts[0].view(torch.uint8)[row:, col // 2 if recipe == "nvfp4" else col :]
    scales, phase = parts[1], (0, 0)
    if recipe.startswith("fp8_block128"):
        scales, phase = scales[row // 128 :, col // 128 :], (row % 128, col % 128)
    elif recipe == "fp8_channel":
        scales = scales[row:]
    elif scales.dim() == 2:
        scales = scales[row:, col // (32 if recipe == "mxfp8" else 16) :]
    for isa in ISAS:
        stored = torch.full((want.shape[1], want.shape[0] + 2) if turned else (want.shape[0], want.shape[1] + 2), -3.0)
        stored = stored.to(dtype)
        dst = stored.t()[:-2] if turned else stored[:, :-2]
        descs = dequantise_desc([codes, scales, *parts[2:]], recipe, dst, phase)
        assert kernels.transform(descs, 2, isa=isa) is None
        assert np.array_equal(raw_bytes(dst), raw_bytes(want))
        assert (stored[:, -2:] == -3).all()


def _names(recipe: str) -> list[str]:
    return ["weight", *(["weight_scale_inv"] if "block" in recipe else ["weight_scale", "weight_scale_2"])][
        : 3 if recipe == "nvfp4" else 2
    ]


@pytest.mark.parametrize("dtype", sorted(DST_OF, key=str))
def test_values_of_every_code_and_size_are_rounded_as_torch_does(dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(254, 1)
    codes[:, [0x7F, 0xFF]] = 0
    scales = torch.tensor([2.0 ** (e - 127) for e in range(1, 255)])[:, None] * 1.7
    want = dequantize_reference({"weight": codes, "weight_scale": scales}, "fp8_channel", dtype)
    for isa in ISAS:
        dst = torch.zeros(254, 256, dtype=dtype)
        kernels.transform(dequantise_desc([codes, scales], "fp8_channel", dst), isa=isa)
        assert np.array_equal(raw_bytes(dst), raw_bytes(want))


@pytest.mark.parametrize("dtype", sorted(DST_OF, key=str))
def test_codes_that_are_no_number_stay_so(dtype):
    codes, scales = torch.arange(256, dtype=torch.uint8)[None].contiguous(), torch.ones(1, 1)
    seen = set()
    for isa in ISAS:
        dst = torch.zeros(1, 256, dtype=dtype)
        kernels.transform(dequantise_desc([codes, scales], "fp8_channel", dst), isa=isa)
        assert torch.nonzero(dst.isnan())[:, 1].tolist() == [0x7F, 0xFF]
        seen.add(raw_bytes(dst).tobytes())
    assert len(seen) == 1


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.one_of(st.integers(1, 300), st.just(1200)),
    style=st.sampled_from(["normal", "sparse"]),
    turned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_requantising_equals_the_reference_settles_and_may_be_in_place(rows, cols, style, turned, seed):
    weight = finite_bf16(np.random.default_rng(seed), (rows, cols), style) * 3
    codes, scales = quantize_reference(weight, "fp8_block128_f32").values()
    want = requantize_e8m0_reference(codes, scales)
    twice = requantize_e8m0_reference(*want)  # differs where a largest code was rounded down to half of 448
    for isa in ISAS:
        stored = torch.full((cols, rows) if turned else (rows, cols), 9, dtype=torch.uint8)
        dst, dst_scales = stored.t() if turned else stored, torch.full((scales.shape[0], scales.shape[1] + 1), -1.0)
        descs = requantise_desc(codes, scales, dst, dst_scales[:, :-1])
        assert kernels.transform(descs, 2, isa=isa) is None
        assert np.array_equal(raw_bytes(dst), raw_bytes(want[0]))
        assert torch.equal(dst_scales[:, :-1], want[1])
        assert (dst_scales[:, -1] == -1).all()
        settled, settled_scales = dst.contiguous(), dst_scales[:, :-1].contiguous()
        in_place = requantise_desc(settled, settled_scales, settled, settled_scales)
        for _ in range(2):
            assert kernels.transform(in_place, isa=isa) is None
            assert np.array_equal(raw_bytes(settled), raw_bytes(twice[0]))
            assert torch.equal(settled_scales, twice[1])
        first = codes.clone()
        kernels.transform(requantise_desc(first, scales, first, dst_scales), isa=isa)
        assert np.array_equal(raw_bytes(first), raw_bytes(want[0]))


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")
@pytest.mark.parametrize("isa", ISAS)
def test_requantising_writes_the_bytes_of_vllm(isa):
    index, blobs = json.loads((VECTORS / "index.json").read_text()), np.load(VECTORS / "vectors.npz")
    compared = 0
    for entry in index["entries"]:
        if (entry["repo"], entry["id"]) != ("vllm-project/vllm", "requant_weight_ue8m0_inplace"):
            continue
        codes, scales, q, s = (blobs[entry["outputs"][o]["blob"]] for o in ("q_in", "s_in", "q", "scale"))
        dst, dst_scales = torch.zeros(codes.shape, dtype=torch.uint8), torch.zeros(scales.shape)
        descs = requantise_desc(torch.from_numpy(codes), torch.from_numpy(scales), dst, dst_scales)
        assert kernels.transform(descs, isa=isa) is None
        assert (dst.numpy().tobytes(), dst_scales.numpy().tobytes()) == (q.tobytes(), s.tobytes())
        compared += 1
    assert compared == 4


def test_requantising_names_the_first_weight_that_decodes_to_no_number():
    codes, scales = torch.zeros(300, 1500, dtype=torch.uint8), torch.ones(3, 12)
    for row, col in ((140, 1400), (141, 3), (290, 0)):
        codes[row, col] = 0x7F
    for isa in ISAS:
        for num_threads in (1, 3):
            dst, dst_scales = torch.zeros_like(codes), torch.zeros_like(scales)
            descs = requantise_desc(codes, scales, dst, dst_scales)
            assert kernels.transform(descs, num_threads, isa=isa) == (4, 140 * 1500 + 1400)
    scales[0, 0] = float("inf")
    assert kernels.transform(requantise_desc(codes, scales, dst, dst_scales)) == (4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": 2}, "op 2 is unknown"),
        ({"recipe_op": 1}, "recipe_op 1 does not quantise"),
        ({"dst_dtype": 0}, "dst_dtype 0"),
        ({"codes": 0}, "codes, scales or dst is null"),
        ({"recipe_op": OP_NVFP4}, "tensor_scale is null"),
        ({"recipe_op": OP_MXFP8, "extent": (2, 33)}, "columns is 33, not a multiple of 32"),
        ({"recipe_op": OP_FP8_SCALED, "row_phase": 128}, "phase 128"),
        ({"op": TRANSFORM_REQUANT_E8M0}, "recipe_op 5 has no 128 x 128 blocks"),
        ({"op": TRANSFORM_REQUANT_E8M0, "recipe_op": OP_FP8_BLOCK128, "col_phase": 8}, "phases 0, 8"),
        ({"op": TRANSFORM_REQUANT_E8M0, "recipe_op": OP_FP8_BLOCK128}, "dst_scales is null"),
    ],
)
def test_a_malformed_transform_is_refused_by_name_and_writes_nothing(change, message):
    codes, scales, dst = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.full((2, 32), 5.0)
    desc = dequantise_desc([codes, scales], "fp8_channel", dst)
    for field, value in change.items():
        desc[field] = value
    with pytest.raises(ConfigError, match=r"TRANSFORM_DESC\[0\]") as caught:
        kernels.transform(desc)
    assert message in str(caught.value)
    assert (dst == 5).all()
