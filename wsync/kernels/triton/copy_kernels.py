"""Kernels that copy, round to bf16 and unpack boxes of four dimensions, and digest what they write.

The first three dimensions are the rows of a matrix whose columns are the last one. The wide kernels move 8-byte words
of contiguous, aligned rows; the others move elements of any strides, and their digest is taken afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wsync.kernels.triton.codec import INFINITY_BITS, MAGNITUDE, bf16_pair, bf16_rounded
from wsync.kernels.triton.constants import (
    BF16,
    BF16_OVERFLOW,
    BF16_ROUND,
    BYTES,
    DESC_WORDS,
    F16,
    F32_EXACT,
    UNCOUNTED,
    UNPACK_EXPONENT,
    UNPACK_FILL,
)
from wsync.kernels.triton.tiles import add_digest, digest_of_words, f32_bits_of_element, report_bad


@triton.jit
def row_offset(row, strides, extents):
    """Element offset of flat rows over the three outer dimensions whose strides and extents begin at the pointers.

    Divides in the width of ``row``: 32 bits where a tile is moved, 64 where any element is looked for.
    """
    middle = tl.load(extents + 1).to(row.dtype)
    inner = tl.load(extents + 2).to(row.dtype)
    outer = row // inner
    offset = (row - outer * inner).to(tl.int64) * tl.load(strides + 2)
    first = outer // middle
    offset += (outer - first * middle).to(tl.int64) * tl.load(strides + 1)
    return offset + first.to(tl.int64) * tl.load(strides)


@triton.jit
def num_rows(extents):
    return tl.load(extents) * tl.load(extents + 1) * tl.load(extents + 2)


@triton.jit
def nonfinite_lanes(words, SRC: tl.constexpr):
    """Not zero where a float in these 8 bytes has an exponent of all ones: adding one to it carries into its sign."""
    if SRC == BF16:
        lanes = ((words & 0x7F807F807F807F80) + 0x0080008000800080) & 0x8000800080008000
    elif SRC == F16:
        lanes = ((words & 0x7C007C007C007C00) + 0x0400040004000400) & 0x8000800080008000
    elif SRC == F32_EXACT:
        lanes = ((words & 0x7F8000007F800000) + 0x0080000000800000) & 0x8000000080000000
    else:
        lanes = ((words & 0x7FF0000000000000) + 0x0010000000000000) & 0x8000000000000000
    return lanes


@triton.jit(do_not_specialize=["dst_base"])
def copy_words(
    table, units, dst_base: tl.int64, result, SRC: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Copies rows of 8-byte words into the bucket; refuses floats that are not finite."""
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    desc = table + desc_idx * DESC_WORDS
    elem_bytes = tl.load(desc + 16) & 0xFFFFFFFF
    row_words = tl.multiple_of((tl.load(desc + 8) * elem_bytes) >> 3, 2)
    first_row = tl.load(unit + 1) * ROWS
    row = first_row + tl.arange(0, ROWS)
    first_word = tl.load(unit + 2).to(tl.int64) * WORDS
    word = first_word + tl.arange(0, WORDS)
    mask = (row < num_rows(desc + 5))[:, None] & (word < row_words)[None, :]
    src = tl.multiple_of(tl.load(desc).to(tl.pointer_type(tl.uint64)), 16)
    src_row = tl.multiple_of((row_offset(row, desc + 1, desc + 5) * elem_bytes) >> 3, 2)
    words = tl.load(src + src_row[:, None] + word[None, :], mask=mask, other=0)
    dst = tl.multiple_of((dst_base + tl.load(desc + 9)).to(tl.pointer_type(tl.uint64)), 16)
    tl.store(dst + row[:, None].to(tl.int64) * row_words + word[None, :], words, mask=mask)
    if SRC != BYTES:
        if tl.max((nonfinite_lanes(words, SRC) != 0).to(tl.int32)) != 0:
            report_bad(result, desc_idx)
    wire_word = tl.load(desc + 10).to(tl.uint64, bitcast=True)
    add_masked(result, words, wire_word, first_row, first_word, row_words, mask)


@triton.jit
def add_masked(result, words, wire_word, first_row, first_word, row_words, mask):
    """Adds the digest of a tile of packed words that begins at a row and a word of its box."""
    first = wire_word + (first_row.to(tl.int64) * row_words + first_word).to(tl.uint64, bitcast=True)
    terms = digest_of_words(
        words & 0xFFFFFFFF, words >> 32, first, row_words.to(tl.uint64), words.shape[0], words.shape[1]
    )
    add_digest(result, tl.where(mask, terms, 0))


@triton.jit(do_not_specialize=["dst_base"])
def round_words(
    table, units, dst_base: tl.int64, result, ARCH: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Rounds contiguous rows of f32 to bf16; ``WORDS`` counts words of the result (4 elements)."""
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    desc = table + desc_idx * DESC_WORDS
    row_pairs = tl.multiple_of(tl.load(desc + 8) >> 1, 4)
    first_row = tl.load(unit + 1) * ROWS
    row = first_row + tl.arange(0, ROWS)
    first_word = tl.load(unit + 2).to(tl.int64) * WORDS
    pair = first_word * 2 + tl.arange(0, WORDS * 2)
    row_ok = (row < num_rows(desc + 5))[:, None]
    mask = row_ok & (pair < row_pairs)[None, :]
    src = tl.multiple_of(tl.load(desc).to(tl.pointer_type(tl.uint64)), 16)
    src_row = tl.multiple_of(row_offset(row, desc + 1, desc + 5) >> 1, 2)
    both = tl.load(src + src_row[:, None] + pair[None, :], mask=mask, other=0)
    even = both.to(tl.uint32)
    odd = (both >> 32).to(tl.uint32)
    if tl.max(tl.maximum(even & MAGNITUDE, odd & MAGNITUDE)) >= BF16_OVERFLOW:
        report_bad(result, desc_idx)
    pairs = bf16_pair(even, odd, ARCH)
    dst = tl.multiple_of((dst_base + tl.load(desc + 9)).to(tl.pointer_type(tl.uint32)), 16)
    tl.store(dst + row[:, None].to(tl.int64) * row_pairs + pair[None, :], pairs, mask=mask)
    low, high = tl.split(tl.reshape(pairs, (ROWS, WORDS, 2)))
    words = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    word = first_word + tl.arange(0, WORDS)
    wire_word = tl.load(desc + 10).to(tl.uint64, bitcast=True)
    mask = row_ok & (word < (row_pairs >> 1))[None, :]
    add_masked(result, words, wire_word, first_row, first_word, row_pairs >> 1, mask)


@triton.jit(do_not_specialize=["dst_base"])
def copy_elements(
    table,
    units,
    dst_base: tl.int64,
    result,
    OP: tl.constexpr,
    SRC: tl.constexpr,
    POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Copies or rounds elements of any strides. Takes no digest."""
    unit = units + 3 * tl.program_id(0)
    desc_idx = tl.load(unit).to(tl.int64)
    desc = table + desc_idx * DESC_WORDS
    cols = tl.load(desc + 8)
    first_row = tl.load(unit + 1) * ROWS
    row = first_row + tl.arange(0, ROWS)
    col = tl.load(unit + 2).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < num_rows(desc + 5))[:, None] & (col < cols)[None, :]
    at = tl.load(desc).to(POINTER) + row_offset(row, desc + 1, desc + 5)[:, None]
    raw = tl.load(at + (col * tl.load(desc + 4))[None, :], mask=mask, other=0)
    packed = row[:, None].to(tl.int64) * cols + col[None, :]
    dst = dst_base + tl.load(desc + 9)
    if OP == BF16_ROUND and SRC != BF16:
        bits = f32_bits_of_element(raw, SRC)
        if tl.max(bits & MAGNITUDE) >= (INFINITY_BITS if SRC == F16 else BF16_OVERFLOW):
            report_bad(result, desc_idx)
        rounded = (bf16_rounded(bits) >> 16).to(tl.uint16)
        tl.store(dst.to(tl.pointer_type(tl.uint16)) + packed, rounded, mask=mask)
    else:
        if SRC != BYTES:
            # An element of fewer bytes is the low lane of a word.
            if tl.max((nonfinite_lanes(raw.to(tl.uint64), SRC) != 0).to(tl.int32)) != 0:
                report_bad(result, desc_idx)
        tl.store(dst.to(POINTER) + packed, raw, mask=mask)


@triton.jit(do_not_specialize=["src_base"])
def unpack_words(
    table, units, src_base: tl.int64, result, INSTALLED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Copies rows of words from the bucket to engine memory, or only digests what is there (``INSTALLED``)."""
    unit = units + 3 * tl.program_id(0)
    desc = table + tl.load(unit).to(tl.int64) * DESC_WORDS
    elem_bytes = tl.load(desc + 15) & 0xFFFFFFFF
    row_words = tl.multiple_of((tl.load(desc + 12) * elem_bytes) >> 3, 2)
    first_row = tl.load(unit + 1) * ROWS
    row = first_row + tl.arange(0, ROWS)
    first_word = tl.load(unit + 2).to(tl.int64) * WORDS
    word = first_word + tl.arange(0, WORDS)
    mask = (row < num_rows(desc + 9))[:, None] & (word < row_words)[None, :]
    dst_row = tl.multiple_of((row_offset(row, desc + 1, desc + 9) * elem_bytes) >> 3, 2)
    dst = tl.multiple_of(tl.load(desc).to(tl.pointer_type(tl.uint64)), 16) + dst_row[:, None] + word[None, :]
    if INSTALLED:
        words = tl.load(dst, mask=mask, other=0)
    else:
        src_row = tl.multiple_of((row_offset(row, desc + 5, desc + 9) * elem_bytes) >> 3, 2)
        src = tl.multiple_of((src_base + tl.load(desc + 13)).to(tl.pointer_type(tl.uint64)), 16)
        words = tl.load(src + src_row[:, None] + word[None, :], mask=mask, other=0)
        tl.store(dst, words, mask=mask)
    wire_word = tl.load(desc + 14)
    if wire_word != UNCOUNTED:
        add_masked(result, words, wire_word.to(tl.uint64, bitcast=True), first_row, first_word, row_words, mask)


@triton.jit(do_not_specialize=["src_base"])
def unpack_elements(
    table, units, src_base: tl.int64, OP: tl.constexpr, POINTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Copies, fills or takes the exponents of elements of any strides. Takes no digest."""
    unit = units + 3 * tl.program_id(0)
    desc = table + tl.load(unit).to(tl.int64) * DESC_WORDS
    first_row = tl.load(unit + 1) * ROWS
    row = first_row + tl.arange(0, ROWS)
    col = tl.load(unit + 2).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < num_rows(desc + 9))[:, None] & (col < tl.load(desc + 12))[None, :]
    at = tl.load(desc).to(POINTER) + row_offset(row, desc + 1, desc + 9)[:, None]
    at += (col * tl.load(desc + 4))[None, :]
    src_offset = row_offset(row, desc + 5, desc + 9)[:, None] + (col * tl.load(desc + 8))[None, :]
    src = src_base + tl.load(desc + 13)
    if OP == UNPACK_FILL:
        value = tl.load(desc + 16) >> 32
        tl.store(at, value.to(at.dtype.element_ty), mask=mask)
    elif OP == UNPACK_EXPONENT:
        bits = tl.load(src.to(tl.pointer_type(tl.uint32)) + src_offset, mask=mask, other=0)
        tl.store(at, (bits >> 23).to(tl.uint8), mask=mask)
    else:
        tl.store(at, tl.load(src.to(POINTER) + src_offset, mask=mask, other=0), mask=mask)
