"""The fp8 operations against the reference arithmetic: codes, scales, digests, cut blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import ISAS, amax_desc, bucket, finite_bf16, pack_desc, raw_bytes
from torch import Tensor

from wsync import kernels
from wsync.formats import digest_bytes, encode_e4m3, round_to_bf16
from wsync.formats.fp8_block128 import block_amax, quantize_block128, quantize_with_scales, scales_of_amax
from wsync.plan.descriptors import OP_FP8_BLOCK128, OP_FP8_BLOCK128_F32, OP_FP8_SCALED, SRC_F32_EXACT

OPS = (OP_FP8_BLOCK128, OP_FP8_BLOCK128_F32)
DTYPES = (torch.bfloat16, torch.float32)
STYLES = ("normal", "wild", "sparse")


def with_phase(box: Tensor, phase: tuple[int, int], op: int) -> tuple[Tensor, Tensor]:
    """Reference codes and scales of a box that begins ``phase`` rows and columns into its first block."""
    rows, cols = box.shape
    values = box.to(torch.float32) if box.dtype == torch.bfloat16 else round_to_bf16(box.contiguous()).to(torch.float32)
    padded = torch.zeros(phase[0] + rows, phase[1] + cols)
    padded[phase[0] :, phase[1] :] = values
    codes, scales = quantize_block128(padded, power_of_two=op == OP_FP8_BLOCK128)
    return codes[phase[0] :, phase[1] :].contiguous(), scales


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.one_of(st.integers(1, 300), st.sampled_from([128, 256, 1024, 1160])),
    offset=st.tuples(st.integers(0, 3), st.integers(0, 9)),
    phase=st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 127), st.integers(0, 127)), st.just((8, 64))),
    layout=st.sampled_from(["rows", "columns", "steps"]),
    dtype=st.sampled_from(DTYPES),
    style=st.sampled_from(STYLES),
    op=st.sampled_from(OPS),
    seed=st.integers(0, 9),
)
def test_fused_quantising_equals_the_reference(rows, cols, offset, phase, layout, dtype, style, op, seed):
    rng = np.random.default_rng(seed)
    step = 2 if layout == "steps" else 1
    shape = (rows + offset[0], (cols + offset[1]) * step)
    storage = finite_bf16(rng, shape if layout != "columns" else shape[::-1], style).to(dtype)
    if dtype == torch.float32 and style == "normal":
        storage += torch.from_numpy(rng.standard_normal(storage.shape).astype(np.float32)) * 1e-5
    box = (storage.t() if layout == "columns" else storage[:, ::step])[offset[0] :, offset[1] :]
    codes, scales = with_phase(box, phase, op)
    for isa in ISAS:
        out, table = bucket(box.numel()), torch.full((scales.shape[0], scales.shape[1] + 3), -1.0)
        descs = pack_desc(box, op, wire_word=17, scales=table, phase=phase)
        got = kernels.pack(descs, out.ctypes.data, 1, isa=isa)
        assert torch.equal(table[:, : scales.shape[1]], scales)
        assert (table[:, scales.shape[1] :] == -1).all()
        assert np.array_equal(out, raw_bytes(codes))
        assert got == (digest_bytes(raw_bytes(codes), 17), None)


def all_finite_bf16() -> Tensor:
    bits = np.arange(0x10000, dtype=np.uint32)
    bits = bits[(bits & 0x7FFF) < 0x7F80].astype(np.uint16)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_the_reference_codec_equals_torch_for_every_bf16_in_range():
    values = all_finite_bf16().to(torch.float32)
    values = values[values.abs() <= 448]
    expected = values.to(torch.float8_e4m3fn)
    assert torch.equal(encode_e4m3(values).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exponent", [-126, -60, -22, -9, -1, 0, 3, 60, 119])
def test_every_bf16_is_encoded_right_for_power_of_two_scales(isa, exponent):
    scale = torch.tensor([[2.0**exponent]])
    everything = all_finite_bf16()
    in_range = everything[everything.to(torch.float64).abs() <= 448 * 2.0**exponent]
    for values in (everything, in_range):  # saturating, and the 16-bit road
        column = values[:, None]
        for begin in range(0, len(values), 128):  # one block: 128 rows and one column
            box = column[begin : begin + 128]
            out = bucket(len(box))
            kernels.pack(pack_desc(box, OP_FP8_SCALED, scales=scale), out.ctypes.data, 1, isa=isa)
            assert np.array_equal(out, raw_bytes(quantize_with_scales(box, scale)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [2.0**-22, 1e-4 / 448, 0.3, 1 / 3, 7.77e-5, 1.0, 123.456])
def test_every_bf16_is_encoded_right_for_any_scale(isa, scale):
    values = all_finite_bf16()
    values = values[values.to(torch.float64).abs() <= 448 * scale]
    rows = -(-len(values) // 128)
    matrix = torch.zeros(rows, 128, dtype=torch.bfloat16)
    matrix.view(-1)[: len(values)] = values
    table = torch.full((-(-rows // 128), 1), scale)
    out = bucket(matrix.numel())
    kernels.pack(pack_desc(matrix, OP_FP8_SCALED, scales=table), out.ctypes.data, 1, isa=isa)
    assert np.array_equal(out, raw_bytes(quantize_with_scales(matrix, table)))


@pytest.mark.parametrize("isa", ISAS)
def test_a_scale_table_with_odd_scales_gives_the_same_codes_as_the_reference(isa):
    rng = np.random.default_rng(3)
    matrix = finite_bf16(rng, (128, 1024), "normal")
    table = torch.tensor([[1e-30, 1e30, 2.0**-140, 0.02, 2.0**-10, 1e-5, 448.0, 3e38]])
    out = bucket(matrix.numel())
    kernels.pack(pack_desc(matrix, OP_FP8_SCALED, scales=table), out.ctypes.data, 1, isa=isa)
    keep = [b for b in range(8) if b != 2]  # 1 / 2^-140 is infinite: any code but the same on every machine
    want = quantize_with_scales(matrix, table).view(torch.uint8).view(128, 8, 128)
    got = torch.from_numpy(out.copy()).view(128, 8, 128)
    assert torch.equal(got[:, keep], want[:, keep])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("isa", ISAS)
def test_f32_as_given_is_not_rounded_to_bf16_first(op, isa):
    rng = np.random.default_rng(4)
    values = torch.from_numpy(rng.standard_normal((200, 300)).astype(np.float32))
    codes, scales = quantize_block128(values, power_of_two=op == OP_FP8_BLOCK128)
    rounded, _ = with_phase(values, (0, 0), op)
    assert not torch.equal(codes.view(torch.uint8), rounded.view(torch.uint8))
    table, out = torch.zeros_like(scales), bucket(values.numel())
    descs = pack_desc(values, op, scales=table, src_dtype=SRC_F32_EXACT)
    kernels.pack(descs, out.ctypes.data, 1, isa=isa)
    assert np.array_equal(out, raw_bytes(codes))
    assert torch.equal(table, scales)


def cuts(extent: int, at: tuple[int, ...]) -> list[tuple[int, int]]:
    edges = [0, *[a for a in at if 0 < a < extent], extent]
    return list(itertools.pairwise(edges))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 400),
    cols=st.integers(1, 300),
    row_cuts=st.lists(st.integers(1, 399), max_size=3, unique=True),
    col_cuts=st.lists(st.integers(1, 299), max_size=2, unique=True),
    op=st.sampled_from(OPS),
    dtype=st.sampled_from(DTYPES),
)
def test_blocks_that_are_cut_anywhere_come_out_as_if_they_were_not(rows, cols, row_cuts, col_cuts, op, dtype):
    rng = np.random.default_rng(rows * 1000 + cols)
    weight = torch.from_numpy(rng.standard_normal((rows, cols)).astype(np.float32)).to(dtype)
    codes, scales = with_phase(weight, (0, 0), op)
    parts = [(r, c) for r in cuts(rows, tuple(sorted(row_cuts))) for c in cuts(cols, tuple(sorted(col_cuts)))]
    for isa in ISAS:
        cells, table = torch.zeros_like(scales), torch.zeros_like(scales)
        grids = [(cells[r[0] // 128 :, c[0] // 128 :], table[r[0] // 128 :, c[0] // 128 :]) for r, c in parts]
        boxes = [weight[slice(*r), slice(*c)] for r, c in parts]
        phases = [(r[0] % 128, c[0] % 128) for r, c in parts]
        descs = np.concatenate([amax_desc(b, *g, p, op) for b, g, p in zip(boxes, grids, phases, strict=True)])
        assert kernels.amax(descs, 2, isa=isa) is None
        values = weight if dtype == torch.bfloat16 else round_to_bf16(weight)
        assert torch.equal(cells, block_amax(values))
        kernels.scales_from_amax(descs)
        assert torch.equal(table, scales)
        assert torch.equal(table, scales_of_amax(cells, op == OP_FP8_BLOCK128))
        for box, grid, phase, (r, c) in zip(boxes, grids, phases, parts, strict=True):
            out = bucket(box.numel())
            got = kernels.pack(pack_desc(box, OP_FP8_SCALED, scales=grid[1], phase=phase), out.ctypes.data, 1, isa=isa)
            want = raw_bytes(codes[slice(*r), slice(*c)])
            assert np.array_equal(out, want)
            assert got.digest == digest_bytes(want, 0)


def test_quantising_gives_the_same_bytes_for_every_number_of_threads_and_instruction_set():
    rng = np.random.default_rng(11)
    shapes = [(700, 1100), (256, 4096), (77, 333), (128, 128)]
    sources = [finite_bf16(rng, shape) for shape in shapes]
    seen = set()
    for isa in ISAS:
        for num_threads in (1, 2, 7, 0):
            descs, tables, offset = [], [], 0
            for i, source in enumerate(sources):
                tables.append(torch.zeros(-(-source.shape[0] // 128), -(-source.shape[1] // 128)))
                descs.append(
                    pack_desc(
                        source, OPS[i % 2], dst_offset=offset, wire_word=offset // 8, scales=tables[-1], piece_idx=i
                    )
                )
                offset += -(-source.numel() // 256) * 256
            out = bucket(offset)
            got = kernels.pack(np.concatenate(descs), out.ctypes.data, num_threads, isa=isa)
            seen.add((got.digest, out.tobytes(), b"".join(raw_bytes(t).tobytes() for t in tables)))
    assert len(seen) == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_non_finite_element_is_named_in_any_tile(isa, dtype):
    rng = np.random.default_rng(12)
    weight = torch.from_numpy(rng.standard_normal((300, 5000)).astype(np.float32)).to(dtype)
    weight[290, 3] = float("inf")
    weight[140, 4500] = float("nan")
    weight[141, 2] = float("nan")
    table, cells = torch.zeros(3, 40), torch.zeros(3, 40)
    descs = pack_desc(weight, OP_FP8_BLOCK128, scales=table, piece_idx=6)
    assert kernels.pack(descs, bucket(weight.numel()).ctypes.data, 2, isa=isa).bad == (6, 140 * 5000 + 4500)
    region = amax_desc(weight, cells, table, (0, 0), OP_FP8_BLOCK128)
    assert kernels.amax(region, 2, isa=isa) == (0, 140 * 5000 + 4500)


@pytest.mark.parametrize("op", OPS)
def test_zero_tiny_and_full_range_blocks_follow_the_recipe(op):
    blocks = torch.zeros(128, 128 * 5, dtype=torch.bfloat16)
    blocks[0, 128] = 1e-6  # far below the floor
    blocks[0, 256] = -448.0
    blocks[0, 384] = 1e37
    blocks[0, 512] = 2.0**-120
    blocks[1] = -0.0
    codes, scales = with_phase(blocks, (0, 0), op)
    for isa in ISAS:
        table, out = torch.zeros_like(scales), bucket(blocks.numel())
        kernels.pack(pack_desc(blocks, op, scales=table), out.ctypes.data, 1, isa=isa)
        assert torch.equal(table, scales)
        assert np.array_equal(out, raw_bytes(codes))
        assert (out.reshape(128, -1)[1] == 0x80).all()
        assert out.reshape(128, -1)[0, 256] == 0xFE
    assert scales[0, 0] == (2.0**-22 if op == OP_FP8_BLOCK128 else np.float32(1e-4) / np.float32(448))
    assert scales[0, 2] == 1.0
