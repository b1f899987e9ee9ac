"""Engine layouts as strided copies, executed here and compared with what other projects do to the same bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.errors import ManifestError
from wsync.formats import encode_e8m0_ceil
from wsync.plan.descriptors import UNPACK_COPY, UNPACK_EXPONENT, UNPACK_FILL
from wsync.plan.layouts import (
    NO_SOURCE,
    Layout,
    block_major_k,
    composed,
    identity_rows,
    interleaved_halves,
    packed_exponents,
    padded_rows,
    row_major,
    shuffled_rows,
    swapped_halves,
    swizzled_128x4,
)
from wsync.plan.strided import StridedCopy, digest_words_of, strided_pieces, unpack_descs
from wsync.spec.box import Box

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
beside_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")
UNWRITTEN = 2**31 - 7


def vector(repo: str, name: str, output: str, source: str) -> np.ndarray:
    index, blobs = json.loads((VECTORS / "index.json").read_text()), np.load(VECTORS / "vectors.npz")
    (entry,) = [e for e in index["entries"] if (e["repo"], e["id"], e["input"]) == (repo, name, source)][:1]
    blob = entry["outputs"][output] if output else index["inputs"][source]
    return blobs[blob["blob"]]


def elements(strides: tuple[int, ...], extents: tuple[int, ...], offset: int) -> np.ndarray:
    grids = np.indices(extents) if extents else np.zeros((0,), np.int64)
    return offset + sum((g * s for g, s in zip(grids, strides, strict=True)), np.zeros(extents, np.int64))


def execute(copies: tuple[StridedCopy, ...], source: np.ndarray, memory: np.ndarray) -> None:
    """What a backend does with the copies, element by element; nothing may be written twice."""
    flat = source.reshape(-1)
    for copy in copies:
        assert len(copy.extents) <= 4
        places = elements(copy.dst_strides, copy.extents, copy.dst_offset)
        assert len(np.unique(places)) == places.size == copy.num_elements
        assert (memory[places] == UNWRITTEN).all()
        if copy.op == UNPACK_FILL:
            memory[places] = copy.fill
            continue
        values = flat[elements(copy.src_strides, copy.extents, copy.src_offset)]
        if copy.op == UNPACK_EXPONENT:
            values = (values.astype(np.float32).view(np.uint32) >> 23).astype(np.int64)
        memory[places] = values


def laid_out(layout: Layout, source: np.ndarray) -> np.ndarray:
    memory = np.full(layout.num_elements, UNWRITTEN, np.int64)
    execute(layout.copies() + layout.fills(), source, memory)
    assert (memory != UNWRITTEN).all()
    return memory


def counted(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape) + 1000


@beside_vectors
def test_row_maps_equal_those_of_flashinfer():
    for tile in (64, 128):
        expected = vector("flashinfer-ai/flashinfer", f"shuffle_matrix_a_rows.tile{tile}", "row_indices", "idx_256x1")
        assert np.array_equal(shuffled_rows(256, tile), expected)
    expected = vector("flashinfer-ai/flashinfer", "reorder_rows_for_gated", "row_indices", "idx_256x1")
    assert np.array_equal(interleaved_halves(256), expected)


@beside_vectors
def test_swizzled_scales_equal_those_of_torchao_and_vllm():
    scales = vector("pytorch/ao", "to_blocked", "", "sf_u8_130x12")
    got = laid_out(swizzled_128x4(scales.shape), scales.astype(np.int64))
    assert np.array_equal(got, vector("pytorch/ao", "to_blocked", "sf_blocked", "sf_u8_130x12"))
    other = vector("vllm-project/vllm", "swizzle_blockscale", "sf_swizzled", "sf_u8_130x12")
    assert np.array_equal(got, other.reshape(-1))
    for source in ("grp_bf16_24x256", "rand_f32_64x256"):
        plain = vector("vllm-project/vllm", "mxfp8_e4m3_quantize_torch", "scale_e8m0", source)
        swizzled = vector("vllm-project/vllm", "mxfp8_e4m3_quantize_torch.swizzled", "scale_swizzled", source)
        assert np.array_equal(laid_out(swizzled_128x4(plain.shape), plain.astype(np.int64)), swizzled)


@beside_vectors
@pytest.mark.parametrize(("source", "num_rows"), [("rand_bf16_128x256", 128), ("edge_bf16_130x140", 130)])
def test_packed_exponents_equal_those_of_sglang(source, num_rows):
    scales = vector("sgl-project/sglang", "requant_weight_ue8m0", "scale", source)
    storage = vector("sgl-project/sglang", "requant_weight_ue8m0", "scale_packed_storage", source)
    got = laid_out(packed_exponents(scales.shape, num_rows), scales)
    assert got.astype(np.uint8).tobytes() == storage.tobytes()


@beside_vectors
def test_a_row_map_as_a_layout_regroups_rows_as_other_projects_do():
    cases = np.load(VECTORS / "layouts.npz")
    native, hf = cases["rope_permute_H4_d8/native"], cases["rope_permute_H4_d8/hf"]
    rows = identity_rows(32).reshape(4, 4, 2).transpose(0, 2, 1).reshape(-1)  # (H half two) -> (H two half)
    assert np.array_equal(laid_out(row_major(native.shape, rows), native), hf.reshape(-1))
    parts = [cases[f"megatron_qkv_H8_g2_d4_gate0/{name}"] for name in ("q", "k", "v")]
    q, k, v = (np.split(identity_rows(48), [32, 40])[i].reshape(2, -1, 4) for i in range(3))
    grouped = np.concatenate([q, k, v], axis=1).reshape(-1)
    fused = np.concatenate(parts)
    assert np.array_equal(
        laid_out(row_major(fused.shape, grouped), fused), cases["megatron_qkv_H8_g2_d4_gate0/qkv"].reshape(-1)
    )


EXPERTS = st.sampled_from([(), (1,), (3,), (2, 2)])


@settings(max_examples=40, deadline=None)
@given(batch=EXPERTS, half=st.integers(1, 9), cols=st.integers(1, 9))
def test_halves_are_swapped_and_interleaved(batch, half, cols):
    part = counted((*batch, 2 * half, cols))
    plain = torch.from_numpy(part)
    w1, w3 = plain.split(half, dim=-2)
    got = laid_out(row_major(part.shape, swapped_halves(2 * half)), part)
    assert np.array_equal(got, torch.cat([w3, w1], dim=-2).reshape(-1))
    got = laid_out(row_major(part.shape, interleaved_halves(2 * half)), part)
    assert np.array_equal(got, torch.stack([w1, w3], dim=-2).reshape(-1))


@settings(max_examples=30, deadline=None)
@given(batch=EXPERTS, tiles=st.integers(1, 4), blocks=st.integers(1, 3), tile=st.sampled_from([64, 128]))
def test_swapped_shuffled_rows_in_blocks_of_columns_are_one_layout(batch, tiles, blocks, tile):
    b = {64: 2, 128: 4}[tile]
    num_rows = tiles * 32
    part = counted((*batch, num_rows, 8 * blocks))
    layout = block_major_k(part.shape, composed(swapped_halves(num_rows), shuffled_rows(num_rows, tile)), block=8)
    x = torch.from_numpy(part).reshape(math.prod(batch), num_rows, -1)
    x = torch.cat([x[:, num_rows // 2 :], x[:, : num_rows // 2]], dim=1)
    x = x.reshape(len(x), -1, 8, b, 8 * blocks).transpose(2, 3).reshape(len(x), num_rows, blocks, 8)
    assert np.array_equal(laid_out(layout, part), x.permute(0, 2, 1, 3).reshape(-1))
    assert len(layout.copies()) <= 32 * math.prod(batch)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.sampled_from([(), (2,)]),
    rows=st.integers(1, 300),
    groups=st.integers(1, 13),
    fill=st.sampled_from([0, 127]),
)
def test_swizzled_scales_are_padded_to_whole_tiles(batch, rows, groups, fill):
    part = counted((*batch, rows, groups))
    num_rows, cols = -(-rows // 128) * 128, -(-groups // 4) * 4
    padded = torch.full((math.prod(batch), num_rows, cols), fill)
    padded[:, :rows, :groups] = torch.from_numpy(part).reshape(-1, rows, groups)
    tiles = padded.reshape(-1, num_rows // 128, 4, 32, cols // 4, 4).permute(0, 1, 4, 3, 2, 5)
    assert np.array_equal(laid_out(swizzled_128x4(part.shape, fill=fill), part), tiles.reshape(-1))


@settings(max_examples=30, deadline=None)
@given(batch=st.sampled_from([(), (2,)]), rows=st.integers(1, 400), groups=st.integers(1, 9), seed=st.integers(0, 9))
def test_packed_exponents_repeat_each_scale_for_its_rows(batch, rows, groups, seed):
    rng = np.random.default_rng(seed)
    shape = (*batch, -(-rows // 128), groups)
    scales = np.ldexp(np.float32(1), rng.integers(-126, 127, shape)).astype(np.float32)
    aligned, cols = -(-rows // 4) * 4, -(-groups // 4) * 4
    expected = torch.zeros((math.prod(batch), aligned, cols), dtype=torch.uint8)
    exponents = encode_e8m0_ceil(torch.from_numpy(scales)).reshape(-1, *shape[-2:])
    expected[:, :rows, :groups] = exponents.repeat_interleave(128, dim=1)[:, :rows]
    expected = expected.reshape(-1, aligned, cols // 4, 4).transpose(1, 2)
    assert np.array_equal(laid_out(packed_exponents(shape, rows), scales), expected.reshape(-1))
    assert {c.op for c in packed_exponents(shape, rows).copies()} == {UNPACK_EXPONENT}


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 20), padded=st.integers(0, 5), cols=st.integers(1, 6), more=st.integers(0, 3))
def test_every_projection_is_padded_at_its_own_end(half, padded, cols, more):
    part = counted((2, 2 * half, cols))
    rows = padded_rows(2 * half, 2 * (half + padded), num_segments=2)
    layout = row_major(part.shape, composed(swapped_halves(2 * half), rows), num_cols=cols + more, fill=9)
    w1, w3 = torch.from_numpy(part).split(half, dim=1)
    expected = torch.cat([torch.nn.functional.pad(w, (0, more, 0, padded), value=9) for w in (w3, w1)], dim=1)
    assert np.array_equal(laid_out(layout, part), expected.reshape(-1))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["rows", "blocks", "swizzle", "exponents"]),
    cuts=st.tuples(*[st.lists(st.integers(0, 200), max_size=2)] * 2),
    seed=st.integers(0, 9),
)
def test_the_boxes_of_a_part_put_together_are_the_whole_part(kind, cuts, seed):
    rows, cols = 96, 24
    shuffle = composed(interleaved_halves(rows), shuffled_rows(rows, 128))
    layout = {
        "rows": lambda: row_major((2, rows, cols), shuffle),
        "blocks": lambda: block_major_k((2, rows, cols), shuffle, block=8),
        "swizzle": lambda: swizzled_128x4((2, rows, cols), shuffle),
        "exponents": lambda: packed_exponents((2, rows, cols), rows * 128 - 5),
    }[kind]()
    rng = np.random.default_rng(seed)
    part = (
        np.ldexp(np.float32(1), rng.integers(-126, 127, layout.shape)) if kind == "exponents" else counted(layout.shape)
    )
    whole = laid_out(layout, part)
    memory = np.full(layout.num_elements, UNWRITTEN, np.int64)
    execute(layout.fills(), part, memory)
    edges = [sorted({0, n, *(c for c in cut if c < n)}) for n, cut in zip((rows, cols), cuts, strict=True)]
    for expert in range(2):
        for top, bottom in zip(edges[0], edges[0][1:], strict=False):
            for left, right in zip(edges[1], edges[1][1:], strict=False):
                box = Box((expert, top, left), (1, bottom - top, right - left))
                source = np.ascontiguousarray(part[expert : expert + 1, top:bottom, left:right])
                execute(layout.copies(box), source, memory)
    assert np.array_equal(memory, whole)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 6), st.integers(-3, 9), st.integers(0, 9)), max_size=12),
    repeats=st.integers(1, 4),
)
def test_strided_pieces_are_the_given_pairs_in_any_order_of_runs(steps, repeats):
    pairs = [(0, 0)]
    for count, src, dst in steps * repeats:
        pairs += [(pairs[-1][0] + src * i, pairs[-1][1] + dst * i) for i in range(1, count + 1)]
    src, dst = np.array(pairs, np.int64).T
    got: list[tuple[int, int]] = []
    for piece in strided_pieces(src, dst):
        extents = tuple(d.extent for d in piece.digits)
        places = [
            elements(tuple(getattr(d, of) for d in piece.digits), extents, getattr(piece, of)) for of in ("src", "dst")
        ]
        got += zip(*(p.reshape(-1).tolist() for p in places), strict=True)
    assert sorted(got) == sorted(pairs)


def test_regular_layouts_of_real_sizes_are_few_copies():
    rows = composed(swapped_halves(4096), interleaved_halves(4096), shuffled_rows(4096, 128))
    for layout, limit in (
        (row_major((8, 4096, 7168)), 1),
        (row_major((8, 4096, 7168), swapped_halves(4096)), 2),
        (row_major((8, 4096, 7168), rows), 4),
        (block_major_k((8, 4096, 7168), rows), 64),
        (swizzled_128x4((4096, 224)), 4),
        (swizzled_128x4((8, 4096, 224)), 32),
        (packed_exponents((32, 56), 4096), 1),
    ):
        assert len(layout.copies()) <= limit
        assert layout.fills() == ()
        assert sum(c.num_elements for c in layout.copies()) == layout.num_elements


def test_descriptors_write_the_layout_and_count_disjoint_words():
    scales = np.ldexp(np.float32(1), np.arange(2 * 5).reshape(2, 5) - 4).astype(np.float32)
    codes = np.arange(130 * 8, dtype=np.uint16).reshape(130, 8)
    for layout, source, elem_bytes in (
        (packed_exponents((2, 5), 130), scales, 1),
        (row_major((130, 8), padded_rows(130, 132), num_cols=10, fill=0x0102), codes, 2),
    ):
        copies = layout.copies() + layout.fills()
        bucket = b"\xee" * 24 + source.tobytes()
        memory = np.full(layout.num_elements * elem_bytes, 0xEE, np.uint8)
        descs = unpack_descs(copies, 0, 24, 70, elem_bytes, piece_idx=5)
        word = 70
        for desc in descs:
            assert (desc["wire_word"], desc["piece_idx"], desc["elem_bytes"]) == (word, 5, elem_bytes)
            word += -(-int(np.prod(desc["extent"])) * elem_bytes // 8)
            run_desc(desc, bucket, memory)
        assert word - 70 == digest_words_of(copies, elem_bytes)
        expected = laid_out(layout, source)
        assert memory.view(f"<u{elem_bytes}").tolist() == expected.tolist()


def run_desc(desc: np.void, bucket: bytes, memory: np.ndarray) -> None:
    """One UNPACK_DESC, byte by byte; its addresses are offsets in ``memory``."""
    size = int(desc["elem_bytes"])
    for index in np.ndindex(*(int(n) for n in desc["extent"])):
        at = int(desc["dst"]) + size * sum(i * int(s) for i, s in zip(index, desc["dst_stride"], strict=True))
        step = sum(i * int(s) for i, s in zip(index, desc["src_stride"], strict=True))
        begin = int(desc["src_offset"]) + step * (4 if desc["op"] == UNPACK_EXPONENT else size)
        value = {
            UNPACK_COPY: lambda b=begin: bucket[b : b + size],
            UNPACK_FILL: lambda: int(desc["fill"]).to_bytes(4, "little")[:size],
            UNPACK_EXPONENT: lambda b=begin: (int.from_bytes(bucket[b : b + 4], "little") >> 23).to_bytes(1, "little"),
        }[int(desc["op"])]()
        memory[at : at + size] = np.frombuffer(value, np.uint8)


def test_what_does_not_fit_a_layout_is_refused_with_both_values():
    for call, says in (
        (lambda: swapped_halves(5), "two halves need a multiple of 2 rows, but there are 5"),
        (lambda: shuffled_rows(48, 128), "multiple of 32 rows, but there are 48"),
        (lambda: shuffled_rows(64, 32), r"tiles of \[64, 128\] rows, but the tile is 32"),
        (lambda: padded_rows(6, 4), "6 rows do not fit the 4"),
        (lambda: composed(identity_rows(4), identity_rows(5)), "takes row 4, but the one before it has 4 rows"),
        (lambda: block_major_k((4, 100)), "multiple of 128 columns, but there are 100"),
        (lambda: row_major((4, 4), identity_rows(5)), r"from 0 to 4, but the part has shape \(4, 4\)"),
        (lambda: row_major((4,)), r"shape \(4,\)"),
        (lambda: row_major((4, 4), num_cols=3), "4 columns do not fit the 3"),
        (lambda: packed_exponents((2, 4), 300), r"have 3 rows of scales, but the scales have shape \(2, 4\)"),
        (lambda: row_major((4, 4)).copies(Box((0, 2), (4, 3))), r"at \(0, 2\) of shape \(4, 3\).*\(4, 4\)"),
    ):
        with pytest.raises(ManifestError, match=says):
            call()
    assert composed(padded_rows(2, 3), identity_rows(3)).tolist() == [0, 1, NO_SOURCE]
