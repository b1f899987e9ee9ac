"""Kernels that quantise: one program per 128 x 128 tile, or per group of whole rows for fp8_channel.

Every kernel takes the descriptor table (17 int64 for each `PACK_DESC`), a table of units (int32 descriptor, tile row,
tile column) and the bucket's address, so that one launch serves any number of tensors. ``result`` holds the digest
and the lowest bad descriptor, both int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wsync.kernels.triton.codec import (
    MAGNITUDE,
    e2m1_pair,
    e2m1_quotient,
    e4m3_pair,
    f32_of,
    f32_of_e4m3,
    multiplier_tensor,
    reciprocal_e8m0,
    scale2_nvfp4,
    scale_channel,
    scale_f32,
    scale_mxfp8,
    scale_nvfp4,
    scale_nvfp4_safe,
    scale_pow2,
    signed_quotient,
)
from wsync.kernels.triton.constants import (
    BLOCK128,
    BLOCK128_F32,
    CHANNEL_SCALED,
    DESC_WORDS,
    F32,
    F32_EXACT,
    MXFP8,
    NVFP4,
    SCALED,
    TENSOR,
    TILE,
)
from wsync.kernels.triton.tiles import (
    emit,
    finite_limit,
    gather_pairs,
    load_pairs,
    report_bad,
    round_amax,
    round_pairs,
)

SAFE_LEAST = tl.constexpr(2.0**-60)
SAFE_MOST = tl.constexpr(2.0**-8)
"""Divisors are up to 448 times ``weight_scale_2``."""


@triton.jit
def tensor_scale2(desc):
    """``weight_scale_2`` of nvfp4, from the amax of the tensor."""
    return scale2_nvfp4(tl.load(tl.load(desc + 13).to(tl.pointer_type(tl.float32))))


@triton.jit
def is_safe(scale2):
    """Whether every block of nvfp4 may divide by multiplying: see `exact_quotient` and `e2m1_quotient`."""
    return (scale2 >= SAFE_LEAST) & (scale2 <= SAFE_MOST)


@triton.jit
def group_codes(even, odd, magnitude, desc, first_row, first_col, rows, cols, OP: tl.constexpr, ARCH: tl.constexpr,
                FULL: tl.constexpr, DIVIDE: tl.constexpr):  # fmt: skip
    """Codes of mxfp8 and nvfp4, whose groups are 32 or 16 columns of a row; writes the groups' scale bytes."""
    PAIRS: tl.constexpr = 16 if OP == MXFP8 else 8  # of one group
    GROUPS: tl.constexpr = TILE // 2 // PAIRS
    amax = f32_of(tl.max(tl.reshape(magnitude, (TILE, GROUPS, PAIRS)), axis=2))
    if OP == MXFP8:
        scale = scale_mxfp8(amax)
        factor = reciprocal_e8m0(scale)
    else:
        tensor_amax = tl.load(tl.load(desc + 13).to(tl.pointer_type(tl.float32)))
        scale2 = scale2_nvfp4(tensor_amax)
        scale = scale_nvfp4(amax, scale2) if DIVIDE else scale_nvfp4_safe(amax, scale2, tensor_amax)
        factor = f32_of_e4m3(scale) * scale2
    row = first_row + tl.arange(0, TILE)
    group = first_col // (2 * PAIRS) + tl.arange(0, GROUPS)
    table = tl.load(desc + 11).to(tl.pointer_type(tl.uint8))
    at = table + row[:, None] * tl.load(desc + 12) + group[None, :]
    if FULL:
        tl.store(at, scale.to(tl.uint8))
    else:
        tl.store(at, scale.to(tl.uint8), mask=(row < rows)[:, None] & (group < cols // (2 * PAIRS))[None, :])
    even_value = tl.reshape(f32_of(even), (TILE, GROUPS, PAIRS))
    odd_value = tl.reshape(f32_of(odd), (TILE, GROUPS, PAIRS))
    if OP == MXFP8:
        codes = e4m3_pair(even_value * factor[:, :, None], odd_value * factor[:, :, None], ARCH)
    elif DIVIDE:
        codes = e2m1_pair(tl.div_rn(even_value, factor[:, :, None]), tl.div_rn(odd_value, factor[:, :, None]), ARCH)
    else:
        reciprocal = tl.div_rn(1.0, factor)[:, :, None]
        most = (factor * 6.5)[:, :, None]
        even_code = e2m1_quotient(even_value, factor[:, :, None], reciprocal, most)
        odd_code = e2m1_quotient(odd_value, factor[:, :, None], reciprocal, most)
        codes = even_code | (odd_code << 4)
    return tl.reshape(codes, (TILE, TILE // 2))


@triton.jit
def scale_of_block(desc, block_row, block_col, amax, OP: tl.constexpr):
    """The multiplier of a 128 x 128 block; writes its scale unless the table holds it."""
    at = tl.load(desc + 11).to(tl.pointer_type(tl.float32)) + block_row * tl.load(desc + 12) + block_col
    if OP == SCALED:
        scale = tl.load(at)
    else:
        scale = scale_pow2(amax) if OP == BLOCK128 else scale_f32(amax)
        tl.store(at, scale)
    return tl.div_rn(1.0, scale)


@triton.jit
def row_scaled_codes(even, odd, desc, row, rows, ARCH: tl.constexpr):
    """fp8_channel with the scales of the table, which may be anything: the plain division."""
    table = tl.load(desc + 11).to(tl.pointer_type(tl.float32))
    scale = tl.load(table + row * tl.load(desc + 12), mask=(row >= 0) & (row < rows), other=1.0)[:, None]
    return e4m3_pair(tl.div_rn(f32_of(even), scale), tl.div_rn(f32_of(odd), scale), ARCH)


@triton.jit(do_not_specialize=["dst_base"])
def quantise_tiles(
    table,
    units,
    dst_base: tl.int64,
    result,
    OP: tl.constexpr,
    SRC: tl.constexpr,
    ARCH: tl.constexpr,
    FULL: tl.constexpr,
    COUNTED: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """One program per unit: a 128 x 128 tile of the tensor's own grid of scale blocks.

    nvfp4 is launched twice, with and without ``DIVIDE``: tensors whose scale allows it go the short way, and the launch
    whose turn it is not returns at once.
    """
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    block_row = tl.load(unit + 1).to(tl.int64)
    block_col = tl.load(unit + 2).to(tl.int64)
    desc = table + desc_idx * DESC_WORDS
    if OP == NVFP4:
        if is_safe(tensor_scale2(desc)) == DIVIDE:
            return
    src = tl.load(desc)
    row_step = tl.load(desc + 3)
    rows = tl.load(desc + 7)
    cols = tl.load(desc + 8)
    first_row = block_row * TILE
    first_col = block_col * TILE
    if OP == BLOCK128 or OP == BLOCK128_F32 or OP == SCALED:
        phases = tl.load(desc + 14)
        first_row -= phases & 0xFFFFFFFF
        first_col -= phases >> 32
    PAIRS: tl.constexpr = TILE // 2
    if FULL:
        ELEM: tl.constexpr = 4 if SRC == F32 or SRC == F32_EXACT else 2
        even, odd = load_pairs(src + (first_row * row_step + first_col) * ELEM, row_step, SRC, TILE, PAIRS)
    else:
        row = first_row + tl.arange(0, TILE)
        col = first_col + 2 * tl.arange(0, PAIRS)
        even, odd = gather_pairs(src, row_step, tl.load(desc + 4), row, col, rows, cols, SRC)
    magnitude = tl.maximum(even & MAGNITUDE, odd & MAGNITUDE)
    top = tl.max(magnitude)
    if top >= finite_limit(SRC):
        report_bad(result, desc_idx)
    even, odd = round_pairs(even, odd, SRC, ARCH)
    if OP == MXFP8 or OP == NVFP4:
        pairs = group_codes(
            even, odd, round_amax(magnitude, SRC), desc, first_row, first_col, rows, cols, OP, ARCH, FULL, DIVIDE
        )
    elif OP == CHANNEL_SCALED:
        pairs = row_scaled_codes(even, odd, desc, first_row + tl.arange(0, TILE), rows, ARCH)
    else:
        if OP == TENSOR:
            multiplier = multiplier_tensor(tl.load(tl.load(desc + 13).to(tl.pointer_type(tl.float32))))
        else:
            multiplier = scale_of_block(desc, block_row, block_col, f32_of(round_amax(top, SRC)), OP)
        pairs = e4m3_pair(f32_of(even) * multiplier, f32_of(odd) * multiplier, ARCH)
    wire_word = tl.load(desc + 10).to(tl.uint64, bitcast=True)
    dst = dst_base + tl.load(desc + 9)
    emit(
        result, dst, wire_word, pairs, first_row, first_col, rows, cols, TILE, PAIRS, OP == NVFP4, FULL, COUNTED, False
    )


@triton.jit(do_not_specialize=["dst_base"])
def quantise_rows(
    table,
    units,
    dst_base: tl.int64,
    result,
    SRC: tl.constexpr,
    ARCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FULL: tl.constexpr,
):
    """fp8_channel for contiguous aligned rows of at most ``COLS`` columns: read once, held in registers.

    ``FULL`` tiles have ``ROWS`` rows of ``COLS`` columns.
    """
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    first_row = tl.load(unit + 1).to(tl.int64) * ROWS
    desc = table + desc_idx * DESC_WORDS
    row_step = tl.load(desc + 3)
    rows = tl.load(desc + 7)
    cols = tl.multiple_of(tl.load(desc + 8), 16)
    row = first_row + tl.arange(0, ROWS)
    ELEM: tl.constexpr = 4 if SRC == F32 or SRC == F32_EXACT else 2
    src = tl.load(desc) + first_row * row_step * ELEM
    if FULL:
        even, odd = load_pairs(src, row_step, SRC, ROWS, COLS // 2)
    else:
        even, odd = load_pairs(src, row_step, SRC, ROWS, COLS // 2, (row < rows)[:, None], cols)
    amax = tl.max(tl.maximum(even & MAGNITUDE, odd & MAGNITUDE), axis=1)
    if tl.max(amax) >= finite_limit(SRC):
        report_bad(result, desc_idx)
    even, odd = round_pairs(even, odd, SRC, ARCH)
    scale = scale_channel(f32_of(round_amax(amax, SRC)))
    scales = tl.load(desc + 11).to(tl.pointer_type(tl.float32))
    tl.store(scales + row * tl.load(desc + 12), scale, mask=row < rows)
    reciprocal = tl.div_rn(1.0, scale)[:, None]
    even_value = signed_quotient(f32_of(even), scale[:, None], reciprocal)
    odd_value = signed_quotient(f32_of(odd), scale[:, None], reciprocal)
    pairs = e4m3_pair(even_value, odd_value, ARCH)
    wire_word = tl.load(desc + 10).to(tl.uint64, bitcast=True)
    dst = dst_base + tl.load(desc + 9)
    emit(result, dst, wire_word, pairs, first_row, 0, rows, cols, ROWS, COLS // 2, False, True, True, not FULL)


@triton.jit
def row_scales(table, units, result, SRC: tl.constexpr):
    """Writes the scales of fp8_channel for 128 rows of any strides; `quantise_tiles` encodes with them afterwards."""
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    first_row = tl.load(unit + 1).to(tl.int64) * TILE
    desc = table + desc_idx * DESC_WORDS
    rows = tl.load(desc + 7)
    cols = tl.load(desc + 8)
    row = first_row + tl.arange(0, TILE)
    amax = tl.zeros((TILE,), tl.uint32)
    for first_col in range(0, cols, TILE):
        col = first_col + 2 * tl.arange(0, TILE // 2)
        even, odd = gather_pairs(tl.load(desc), tl.load(desc + 3), tl.load(desc + 4), row, col, rows, cols, SRC)
        amax = tl.maximum(amax, tl.max(tl.maximum(even & MAGNITUDE, odd & MAGNITUDE), axis=1))
    if tl.max(amax) >= finite_limit(SRC):
        report_bad(result, desc_idx)
    scales = tl.load(desc + 11).to(tl.pointer_type(tl.float32))
    tl.store(scales + row * tl.load(desc + 12), scale_channel(f32_of(round_amax(amax, SRC))), mask=row < rows)
