"""Kernels that read and reduce: amax and scales, digests, and the search for the first bad element."""

from __future__ import annotations

import triton
import triton.language as tl

from wsync.kernels.triton.codec import (
    INFINITY_BITS,
    MAGNITUDE,
    multiplier_tensor,
    scale2_nvfp4,
    scale_channel,
    scale_f32,
    scale_pow2,
)
from wsync.kernels.triton.constants import (
    AMAX_WORDS,
    BF16_OVERFLOW,
    BLOCK128,
    BLOCK128_F32,
    CHANNEL,
    DESC_WORDS,
    F32,
    F32_EXACT,
    TENSOR,
    TILE,
)
from wsync.kernels.triton.copy_kernels import nonfinite_lanes, row_offset
from wsync.kernels.triton.tiles import (
    add_digest,
    digest_of_words,
    finite_limit,
    gather_pairs,
    load_pairs,
    report_bad,
    round_amax,
)


@triton.jit
def amax_tiles(table, units, result, OP: tl.constexpr, SRC: tl.constexpr, FULL: tl.constexpr):
    """Raises the amax cells of 128 x 128 tiles: of the block, of each row, or of the box."""
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    block_row = tl.load(unit + 1).to(tl.int64)
    block_col = tl.load(unit + 2).to(tl.int64)
    desc = table + desc_idx * AMAX_WORDS
    row_step = tl.load(desc + 1)
    rows = tl.load(desc + 3)
    first_row = block_row * TILE
    first_col = block_col * TILE
    cell = tl.load(desc + 5).to(tl.pointer_type(tl.int32))
    if OP == BLOCK128 or OP == BLOCK128_F32:
        phases = tl.load(desc + 9)
        first_row -= phases & 0xFFFFFFFF
        first_col -= phases >> 32
        cell += block_row * tl.load(desc + 6) + block_col
    row = first_row + tl.arange(0, TILE)
    if FULL:
        ELEM: tl.constexpr = 4 if SRC == F32 or SRC == F32_EXACT else 2
        src = tl.load(desc) + (first_row * row_step + first_col) * ELEM
        even, odd = load_pairs(src, row_step, SRC, TILE, TILE // 2)
    else:
        col = first_col + 2 * tl.arange(0, TILE // 2)
        even, odd = gather_pairs(tl.load(desc), row_step, tl.load(desc + 2), row, col, rows, tl.load(desc + 4), SRC)
    magnitude = tl.maximum(even & MAGNITUDE, odd & MAGNITUDE)
    if OP == CHANNEL:
        amax = tl.max(magnitude, axis=1)
        top = tl.max(amax)
        mask = (row >= 0) & (row < rows)
        bits = round_amax(amax, SRC).to(tl.int32, bitcast=True)
        tl.atomic_max(cell + row * tl.load(desc + 6), bits, mask=mask, sem="relaxed")
    else:
        top = tl.max(magnitude)
        tl.atomic_max(cell, round_amax(top, SRC).to(tl.int32, bitcast=True), sem="relaxed")
    if top >= finite_limit(SRC):
        report_bad(result, desc_idx)


@triton.jit
def scales_of_cells(table, units, OP: tl.constexpr, CELLS: tl.constexpr):
    """Scales of up to ``CELLS`` cells: of a row of blocks, of rows, or of the box."""
    unit = units + 3 * tl.program_id(0)
    desc = table + tl.load(unit).to(tl.int64) * AMAX_WORDS
    line = tl.load(unit + 1).to(tl.int64)
    cell = tl.load(unit + 2).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    amax = tl.load(desc + 5).to(tl.pointer_type(tl.float32))
    scales = tl.load(desc + 7).to(tl.pointer_type(tl.float32))
    if OP == CHANNEL:
        mask = cell < tl.load(desc + 3)
        value = tl.load(amax + cell * tl.load(desc + 6), mask=mask, other=0.0)
        tl.store(scales + cell * tl.load(desc + 8), scale_channel(value), mask=mask)
    elif OP == BLOCK128 or OP == BLOCK128_F32:
        phase = tl.load(desc + 9) >> 32
        mask = cell < (tl.load(desc + 4) + phase + TILE - 1) // TILE
        value = tl.load(amax + line * tl.load(desc + 6) + cell, mask=mask, other=0.0)
        scale = scale_pow2(value) if OP == BLOCK128 else scale_f32(value)
        tl.store(scales + line * tl.load(desc + 8) + cell, scale, mask=mask)
    elif OP == TENSOR:
        tl.store(scales, tl.div_rn(1.0, multiplier_tensor(tl.load(amax))))
    else:
        tl.store(scales, scale2_nvfp4(tl.load(amax)))


@triton.jit
def bytes_to_words(raw, WORDS: tl.constexpr):
    """Little-endian words of a tile of ``WORDS`` x 8 bytes."""
    return tl.sum(raw.to(tl.uint64) << (8 * tl.arange(0, 8)).to(tl.uint64)[None, :], axis=1)


@triton.jit
def digest_ranges(ranges, units, result, ALIGNED: tl.constexpr, WORDS: tl.constexpr):
    """Digests contiguous bytes: ``ranges`` holds address, bytes and first wire word, all int64."""
    unit = units + 3 * tl.program_id(0)
    entry = ranges + tl.load(unit).to(tl.int64) * 3
    address = tl.load(entry)
    nbytes = tl.load(entry + 1)
    first = tl.load(unit + 1).to(tl.int64) * WORDS
    word = first + tl.arange(0, WORDS)
    if ALIGNED:  # at both ends to 16 bytes
        base = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16)
        words = tl.load(base + word, mask=word < tl.multiple_of(nbytes >> 3, 2), other=0)
    else:
        byte = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        raw = tl.load(address.to(tl.pointer_type(tl.uint8)) + byte, mask=byte < nbytes, other=0)
        words = bytes_to_words(raw, WORDS)
    add_row(result, words, tl.load(entry + 2), first, word * 8 < nbytes, WORDS)


@triton.jit
def add_row(result, words, wire_word, first, mask, WORDS: tl.constexpr):
    """Adds the digest of consecutive words of a packed box."""
    words = words[None, :]
    row_word = (wire_word + first).to(tl.uint64, bitcast=True)
    terms = digest_of_words(words & 0xFFFFFFFF, words >> 32, row_word, row_word * 0, 1, WORDS)
    add_digest(result, tl.where(mask[None, :], terms, 0))


@triton.jit
def digest_boxes(table, units, result, WORDS: tl.constexpr):
    """Digests what lies at the destinations of `UNPACK_DESC` records of any strides, byte by byte."""
    unit = units + 3 * tl.program_id(0)
    desc = table + tl.load(unit).to(tl.int64) * DESC_WORDS
    elem_bytes = tl.load(desc + 15) & 0xFFFFFFFF
    cols = tl.load(desc + 12)
    nbytes = tl.load(desc + 9) * tl.load(desc + 10) * tl.load(desc + 11) * cols * elem_bytes
    first = tl.load(unit + 1).to(tl.int64) * WORDS
    word = first + tl.arange(0, WORDS)
    byte = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    elem = byte // elem_bytes
    offset = row_offset(elem // cols, desc + 1, desc + 9) + (elem % cols) * tl.load(desc + 4)
    at = tl.load(desc).to(tl.pointer_type(tl.uint8)) + offset * elem_bytes + byte % elem_bytes
    words = bytes_to_words(tl.load(at, mask=byte < nbytes, other=0), WORDS)
    add_row(result, words, tl.load(desc + 14), first, word * 8 < nbytes, WORDS)


@triton.jit
def first_bad(desc, result, POINTER: tl.constexpr, SRC: tl.constexpr, ROUNDED: tl.constexpr, ELEMS: tl.constexpr):
    """The lowest packed index of an element of one `PACK_DESC` that is not finite, or not once it is rounded."""
    elem = tl.program_id(0).to(tl.int64) * ELEMS + tl.arange(0, ELEMS)
    cols = tl.load(desc + 8)
    count = tl.load(desc + 5) * tl.load(desc + 6) * tl.load(desc + 7) * cols
    offset = row_offset(elem // cols, desc + 1, desc + 5) + (elem % cols) * tl.load(desc + 4)
    raw = tl.load(tl.load(desc).to(POINTER) + offset, mask=elem < count, other=0)
    if SRC == F32 or SRC == F32_EXACT:
        bad = (raw & MAGNITUDE) >= (BF16_OVERFLOW if ROUNDED else INFINITY_BITS)
    else:
        bad = nonfinite_lanes(raw.to(tl.uint64), SRC) != 0
    tl.atomic_min(result, tl.min(tl.where(bad, elem, 0x7FFFFFFFFFFFFFFF)), sem="relaxed")
