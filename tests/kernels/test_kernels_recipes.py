"""Recipes whose scale blocks lie in a row or are the whole matrix: channel, tensor, mxfp8, nvfp4."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import ISAS, amax_desc, bucket, code_bytes, finite_bf16, matrix_of, pack_desc, raw_bytes
from torch import Tensor

from wsync import kernels
from wsync.formats import digest_bytes, round_to_bf16
from wsync.formats.amax import row_amax
from wsync.formats.fp8_channel import quantize_channel, quantize_rows_with_scales
from wsync.formats.fp8_tensor import quantize_tensor
from wsync.formats.mxfp8 import quantize_mxfp8
from wsync.formats.nvfp4 import quantize_nvfp4
from wsync.plan.descriptors import (
    OP_FP8_CHANNEL,
    OP_FP8_CHANNEL_SCALED,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
    SRC_F16,
    SRC_F32,
    SRC_F32_EXACT,
)

OPS = (OP_FP8_CHANNEL, OP_FP8_TENSOR, OP_MXFP8, OP_NVFP4)
GROUPS = {OP_MXFP8: 32, OP_NVFP4: 16}
SOURCES = {
    "bf16": (torch.bfloat16, None),
    "f16": (torch.float16, SRC_F16),
    "f32 rounded": (torch.float32, SRC_F32),
    "f32": (torch.float32, SRC_F32_EXACT),
}
VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"


def reference(values: Tensor, op: int, amax: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes and the scales that the operation writes (None: it writes none)."""
    if op == OP_FP8_CHANNEL:
        return quantize_channel(values)
    if op == OP_FP8_TENSOR:
        return quantize_tensor(values, amax)[0], None
    if op == OP_MXFP8:
        return quantize_mxfp8(values)
    codes, scales, _ = quantize_nvfp4(values, amax)
    return codes, scales


def packed(box: Tensor, op: int, scales: Tensor | None, amax: Tensor, isa: str, **fields) -> tuple[np.ndarray, object]:
    out = bucket(code_bytes(op, box.numel()) + 8, fill=0xAA)
    desc = pack_desc(box, op, scales=scales, amax=amax, wire_word=21, **fields)
    got = kernels.pack(desc, out.ctypes.data, 1, isa=isa)
    assert (out[-8:] == 0xAA).all()
    return out[:-8], got


def assert_packs_like_the_reference(box: Tensor, values: Tensor, op: int, amax: Tensor, **fields) -> None:
    codes, scales = reference(values, op, amax)
    want = raw_bytes(codes)
    for isa in ISAS:
        table = None
        if scales is not None:
            table = torch.full((scales.shape[0], scales.shape[1] + 3), 77, dtype=torch.uint8)
            table = table.to(torch.float32) if op == OP_FP8_CHANNEL else table
        out, got = packed(box, op, table, amax, isa, **fields)
        assert np.array_equal(out, want), isa
        assert got == (digest_bytes(want, 21), None)
        if table is not None and scales is not None:
            assert np.array_equal(raw_bytes(table[:, : scales.shape[1]]), raw_bytes(scales)), isa
            assert (table[:, scales.shape[1] :] == 77).all()


@settings(max_examples=80, deadline=None)
@given(
    op=st.sampled_from(OPS),
    rows=st.integers(1, 90),
    cols=st.one_of(st.integers(1, 300), st.sampled_from([1024, 1025, 1056, 1160, 2049, 2080])),
    layout=st.sampled_from(["rows", "columns", "steps"]),
    source=st.sampled_from(sorted(SOURCES)),
    style=st.sampled_from(["normal", "wild", "sparse"]),
    offset=st.tuples(st.integers(0, 3), st.integers(0, 9)),
    seed=st.integers(0, 9),
)
def test_any_box_is_quantised_as_the_reference_does(op, rows, cols, layout, source, style, offset, seed):
    cols = -(-cols // GROUPS.get(op, 1)) * GROUPS.get(op, 1)
    dtype, src_dtype = SOURCES[source]
    shape = (rows + offset[0], cols + offset[1])
    box = matrix_of(np.random.default_rng(seed), shape, style, layout, dtype)[offset[0] :, offset[1] :]
    values = round_to_bf16(box.contiguous()) if src_dtype == SRC_F32 else box
    amax = values.to(torch.float32).abs().max().reshape(())
    assert_packs_like_the_reference(box, values, op, amax, src_dtype=src_dtype)
    for isa in ISAS:  # the amax that the kernels find
        cells = torch.zeros(rows, 2)
        kind = OP_FP8_TENSOR if op == OP_MXFP8 else op
        descs = amax_desc(box, cells, cells, (0, 0), kind, src_dtype)
        assert kernels.amax(descs, 1, isa=isa) is None
        want = row_amax(values)[:, 0] if op == OP_FP8_CHANNEL else amax.reshape(1)
        assert torch.equal(cells[: len(want), 0], want)
        assert (cells[len(want) :] == 0).all()
        assert (cells[:, 1] == 0).all()


def every_bf16() -> Tensor:
    bits = np.arange(0x10000, dtype=np.uint32)
    finite = bits[(bits & 0x7FFF) < 0x7F80].astype(np.uint16)
    return torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16)


def arrangements() -> list[Tensor]:
    """Every finite bf16 value among neighbours of its own size, and among values of all sizes."""
    values = every_bf16()
    by_size = values[values.abs().to(torch.float32).argsort(stable=True)]
    shuffled = values[torch.from_numpy(np.random.default_rng(0).permutation(len(values)))]
    return [by_size.view(255, 256), shuffled.view(255, 256)]


def as_largest_of_its_group(size: int) -> Tensor:
    """A group for each finite bf16 value and smaller ones."""
    values = every_bf16()
    groups = torch.stack([values, torch.zeros_like(values), -values, values / 3], dim=1)
    return groups.repeat(1, size // 4).view(255, -1)


@pytest.mark.parametrize("op", OPS)
def test_every_bf16_value_is_encoded_as_the_reference_does(op):
    largest = torch.tensor(torch.finfo(torch.bfloat16).max)
    for matrix in arrangements():
        assert_packs_like_the_reference(matrix, matrix, op, largest)
        if op in (OP_FP8_TENSOR, OP_NVFP4):  # any amax: what is larger saturates
            for amax in (0.0, 9.2e-41, 2.0**-120, 1e-4, 0.3, 1.0, 448.0, 1e30):
                assert_packs_like_the_reference(matrix, matrix, op, torch.tensor(amax))
    if op in GROUPS:
        matrix = as_largest_of_its_group(GROUPS[op])
        assert_packs_like_the_reference(matrix, matrix, op, largest)


@pytest.mark.parametrize("isa", ISAS)
def test_every_bf16_value_is_divided_by_any_scale_of_a_row(isa):
    values = every_bf16()
    scales = torch.tensor([2.0**-126, 1e-30, 1.0 / (448 * 512), 1 / 3, 0.3, 1.0, 123.456, 2.0**60, 3e38])
    rows = values.expand(len(scales), -1)
    out = bucket(rows.numel())
    desc = pack_desc(rows, OP_FP8_CHANNEL_SCALED, scales=scales, wire_word=5)
    want = raw_bytes(quantize_rows_with_scales(rows, scales[:, None]))
    assert kernels.pack(desc, out.ctypes.data, 1, isa=isa) == (digest_bytes(want, 5), None)
    assert np.array_equal(out, want)


@settings(max_examples=30, deadline=None)
@given(
    op=st.sampled_from([OP_FP8_CHANNEL, OP_FP8_TENSOR, OP_NVFP4]),
    rows=st.integers(1, 60),
    groups=st.integers(1, 20),
    row_cuts=st.lists(st.integers(1, 59), max_size=2, unique=True),
    col_cuts=st.lists(st.integers(1, 19), max_size=2, unique=True),
    source=st.sampled_from(["bf16", "f32 rounded"]),
    seed=st.integers(0, 9),
)
def test_matrices_that_are_cut_anywhere_come_out_as_if_they_were_not(
    op, rows, groups, row_cuts, col_cuts, source, seed
):
    dtype, src_dtype = SOURCES[source]
    weight = matrix_of(np.random.default_rng(seed), (rows, groups * 16), "normal", "rows", dtype)
    values = round_to_bf16(weight) if src_dtype == SRC_F32 else weight
    amax = values.to(torch.float32).abs().max().reshape(())
    codes, scales = reference(values, op, amax)
    cols = [16 * c for c in sorted(col_cuts) if c < groups]
    edges_r = list(itertools.pairwise([0, *[r for r in sorted(row_cuts) if r < rows], rows]))
    edges_c = list(itertools.pairwise([0, *cols, groups * 16]))
    parts = [(slice(*r), slice(*c)) for r in edges_r for c in edges_c]
    per_row = op == OP_FP8_CHANNEL
    for isa in ISAS:
        cells, table = torch.zeros(rows if per_row else 1, 1), torch.zeros(rows if per_row else 1, 1)
        begins = [r.start if per_row else 0 for r, _ in parts]
        descs = np.concatenate(
            [
                amax_desc(weight[part], cells[at:], table[at:], (0, 0), op, src_dtype)
                for part, at in zip(parts, begins, strict=True)
            ]
        )
        assert kernels.amax(descs, 2, isa=isa) is None
        kernels.scales_from_amax(descs)
        if per_row:
            assert torch.equal(table, scales)
        elif op == OP_FP8_TENSOR:
            assert torch.equal(table.reshape(()), quantize_tensor(values, amax)[1])
        else:
            assert torch.equal(table.reshape(1), quantize_nvfp4(values, amax)[2])
        block_scales = torch.zeros(rows, groups, dtype=torch.uint8)
        for (row, col), at in zip(parts, begins, strict=True):
            box = weight[row, col]
            scaled = table[at:] if per_row else block_scales[row, col.start // 16 :]
            packs = OP_FP8_CHANNEL_SCALED if per_row else op
            out, got = packed(box, packs, scaled, cells, isa, src_dtype=src_dtype)
            halves = 2 if op == OP_NVFP4 else 1
            want = raw_bytes(codes[row, col.start // halves : col.stop // halves])
            assert np.array_equal(out, want)
            assert got == (digest_bytes(want, 21), None)
        if op == OP_NVFP4:
            assert np.array_equal(raw_bytes(block_scales), raw_bytes(scales))


def test_the_number_of_threads_changes_no_bit():
    rng = np.random.default_rng(3)
    shapes = [(700, 1088), (3, 4096), (129, 96), (64, 64)]
    sources = [finite_bf16(rng, shape) for shape in shapes] + [finite_bf16(rng, (512, 640)).t()]
    amax = torch.tensor(0.125)
    for op in OPS:
        seen = set()
        for isa, num_threads in itertools.product(ISAS, (1, 2, 7, 0)):
            descs, tables, offset = [], [], 0
            for i, source in enumerate(sources):
                width = 1 if op == OP_FP8_CHANNEL else source.shape[1] // 16
                dtype = torch.float32 if op == OP_FP8_CHANNEL else torch.uint8
                tables.append(torch.zeros(source.shape[0], width, dtype=dtype))
                word = offset // 8
                descs.append(
                    pack_desc(source, op, dst_offset=offset, wire_word=word, scales=tables[-1], amax=amax, piece_idx=i)
                )
                offset += -(-source.numel() // 256) * 256
            out = bucket(offset)
            got = kernels.pack(np.concatenate(descs), out.ctypes.data, num_threads, isa=isa)
            seen.add((got.digest, got.bad, out.tobytes(), b"".join(raw_bytes(t).tobytes() for t in tables)))
        assert len(seen) == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_the_first_value_that_is_not_finite_is_named(op, source):
    dtype, src_dtype = SOURCES[source]
    scales, amax, cells = torch.zeros(1200, 64), torch.tensor(1.0), torch.zeros(1200, 1)
    for layout, bad in itertools.product(("rows", "columns"), (float("nan"), float("inf"), float("-inf"), 3.4e38)):
        weight = matrix_of(np.random.default_rng(1), (1200, 640), "normal", layout, dtype)
        for row, col in ((1199, 0), (700, 631), (701, 2)):
            weight[row, col] = bad
        finite = bad == 3.4e38 and src_dtype != SRC_F32 and bool(weight.isfinite().all())
        for isa in ISAS:
            out = bucket(weight.numel())
            desc = pack_desc(weight, op, scales=scales, amax=amax, piece_idx=8, src_dtype=src_dtype)
            expected = None if finite else (8, 700 * 640 + 631)
            assert kernels.pack(desc, out.ctypes.data, 2, isa=isa).bad == expected
            kind = OP_FP8_CHANNEL if op == OP_MXFP8 else op
            region = amax_desc(weight, cells, scales, (0, 0), kind, src_dtype)
            assert kernels.amax(region, 2, isa=isa) == (None if finite else (0, 700 * 640 + 631))


def test_zero_and_tiny_matrices_follow_their_recipes():
    for value in (0.0, -0.0, 1e-40, 9.2e-41, 1e-30, -1e-6):
        matrix = torch.full((3, 64), value, dtype=torch.bfloat16)
        matrix[1] = 0
        matrix[2, ::2] = -0.0
        for op in OPS:
            amax = matrix.to(torch.float32).abs().max().reshape(())
            assert_packs_like_the_reference(matrix, matrix, op, amax)


CASES = {
    "fp8_channel": ("vllm-project/vllm", "online_ptpc", ("q", "weight_scale"), 4),
    "fp8_tensor": ("sgl-project/sglang", "input_to_float8", ("q", "scale_inv"), 2),
    "mxfp8": ("pytorch/ao", "to_mx.e4m3.RCEIL", ("q", "scale_e8m0"), 2),
    "nvfp4": ("NVIDIA/Model-Optimizer", "nvfp4", ("weight_packed", "weight_scale_e4m3", "weight_scale_2"), 2),
}


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recipe", CASES)
def test_kernels_write_the_bytes_of_other_projects_quantisers(recipe, isa, monkeypatch):
    monkeypatch.setenv("WSYNC_ISA", isa)
    index, blobs = json.loads((VECTORS / "index.json").read_text()), np.load(VECTORS / "vectors.npz")
    repo, name, outputs, num_cases = CASES[recipe]
    compared = 0
    for entry in index["entries"]:
        if (entry["repo"], entry["id"], entry["mode"]) != (repo, name, "cpu") or "nonfinite" in entry["input"]:
            continue
        bits = torch.from_numpy(blobs[index["inputs"][entry["input"]]["blob"]])
        weight = bits.view(torch.bfloat16) if bits.dtype == torch.int16 else bits
        parts = kernels.quantize(weight, recipe, "cpu")
        for part, output in zip(parts.values(), outputs, strict=True):
            facts = entry["outputs"][output]
            assert tuple(part.shape) == tuple(facts["shape"])
            assert raw_bytes(part).tobytes() == blobs[facts["blob"]].tobytes(), (entry["input"], output)
        compared += 1
    assert compared == num_cases


@pytest.mark.parametrize("recipe", [*CASES, "fp8_block128_f32"])
def test_every_f16_value_is_taken_exactly(recipe):
    bits = np.arange(0x10000, dtype=np.uint32)
    bits = bits[(bits & 0x7FFF) < 0x7C00].astype(np.uint16)
    weight = torch.from_numpy(bits.view(np.int16)).view(torch.float16).view(62, 1024)
    expected = kernels.quantize(weight.to(torch.float32), recipe, "reference")
    got = kernels.quantize(weight, recipe, "cpu")
    assert all(np.array_equal(raw_bytes(got[name]), raw_bytes(expected[name])) for name in expected)


@pytest.mark.parametrize("recipe", ["fp8_block128", "fp8_channel", "mxfp8", "nvfp4"])
def test_bits_do_not_depend_on_whether_the_caller_flushes_subnormals(recipe):
    bits = torch.arange(1, 4097, dtype=torch.int32).view(32, 128) * 1021
    weight = bits.view(torch.float32)  # all subnormal
    want = kernels.quantize(weight, recipe)
    assert torch.set_flush_denormal(True)
    try:
        got = kernels.quantize(weight, recipe)
    finally:
        torch.set_flush_denormal(False)
    for name, part in want.items():
        assert torch.equal(got[name].view(torch.uint8), part.view(torch.uint8)), name
