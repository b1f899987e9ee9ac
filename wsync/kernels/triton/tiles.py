"""What the kernels share: loading tiles of pairs of columns, joining codes to words, storing and digesting them.

``FULL`` tiles lie wholly in the box and have contiguous rows that are aligned to 16 bytes at both ends: no masks,
128-bit loads and stores. All others take any strides and edges, element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wsync.kernels.triton.codec import INFINITY_BITS, UPPER_HALF, bf16_pair, bf16_rounded, bits_of
from wsync.kernels.triton.constants import BF16_OVERFLOW, DIGEST_KEY, F16, F32, F32_EXACT


@triton.jit
def f32_bits_of_element(raw, SRC: tl.constexpr):
    """f32 bits of a source element that was loaded as an unsigned integer."""
    if SRC == F32 or SRC == F32_EXACT:
        bits = raw.to(tl.uint32)
    elif SRC == F16:
        bits = bits_of(raw.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32))
    else:
        bits = raw.to(tl.uint32) << 16
    return bits


@triton.jit
def load_inside(at, pair, row_ok, cols):
    if row_ok is None:
        both = tl.load(at)
    else:
        both = tl.load(at, mask=row_ok & (pair < tl.multiple_of(cols >> 1, 8)), other=0)
    return both


@triton.jit
def load_pairs(address, row_step, SRC: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, row_ok=None, cols=None):
    """f32 bits of the even and the odd columns of a tile with contiguous, aligned rows; outside the box: zero."""
    row = tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    if SRC == F32 or SRC == F32_EXACT:
        base = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16)
        at = base + row * tl.multiple_of(row_step >> 1, 2) + pair
        both = load_inside(at, pair, row_ok, cols)
        even = both.to(tl.uint32)
        odd = (both >> 32).to(tl.uint32)
    else:
        base = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
        at = base + row * tl.multiple_of(row_step >> 1, 4) + pair
        both = load_inside(at, pair, row_ok, cols)
        if SRC == F16:
            even = f32_bits_of_element(both & 0xFFFF, SRC)
            odd = f32_bits_of_element(both >> 16, SRC)
        else:
            even = both << 16
            odd = both & UPPER_HALF
    return even, odd


@triton.jit
def gather_pairs(address, row_step, col_step, row, col, rows, cols, SRC: tl.constexpr):
    """The same for any strides; ``row`` and ``col`` (of the even elements) count from ``address``, outside: zero."""
    if SRC == F32 or SRC == F32_EXACT:
        base = address.to(tl.pointer_type(tl.uint32))
    else:
        base = address.to(tl.pointer_type(tl.uint16))
    row_ok = ((row >= 0) & (row < rows))[:, None]
    at = base + row[:, None] * row_step + (col * col_step)[None, :]
    even_raw = tl.load(at, mask=row_ok & ((col >= 0) & (col < cols))[None, :], other=0)
    odd_raw = tl.load(at + col_step, mask=row_ok & ((col >= -1) & (col + 1 < cols))[None, :], other=0)
    return f32_bits_of_element(even_raw, SRC), f32_bits_of_element(odd_raw, SRC)


@triton.jit
def finite_limit(SRC: tl.constexpr):
    """From this magnitude on a source value is bad: not finite, or not so once it is rounded to bf16."""
    return BF16_OVERFLOW if SRC == F32 else INFINITY_BITS


@triton.jit
def round_pairs(even, odd, SRC: tl.constexpr, ARCH: tl.constexpr):
    if SRC == F32:
        both = bf16_pair(even, odd, ARCH)
        even = both << 16
        odd = both & UPPER_HALF
    return even, odd


@triton.jit
def round_amax(bits, SRC: tl.constexpr):
    """The amax of rounded values from that of unrounded ones: rounding keeps the order."""
    return bf16_rounded(bits) if SRC == F32 else bits


@triton.jit
def digest_of_words(low, high, row_word, words_per_row, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """f of each word of a tile; ``row_word`` is the wire word of the tile's first one (see ``csrc/core/digest.h``)."""
    row_key = (row_word + 1) * DIGEST_KEY + tl.arange(0, ROWS).to(tl.uint64) * (words_per_row * DIGEST_KEY)
    key = row_key[:, None] + (tl.arange(0, WORDS).to(tl.uint64) * DIGEST_KEY)[None, :]
    x = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) ^ key
    return (x & 0xFFFFFFFF) * (x >> 32) + x


@triton.jit
def add_digest(result, terms):
    tl.atomic_add(result, tl.sum(terms).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def report_bad(result, desc_idx):
    """The host looks for the element itself, in the lowest descriptor that has one."""
    tl.atomic_min(result + 1, desc_idx, sem="relaxed")


@triton.jit
def words_of_pairs(pairs, BITS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Joins pairs of codes of ``BITS`` bits each (16: fp8, 8: fp4) to 32-bit words."""
    first, second = tl.split(tl.reshape(pairs, (ROWS, PAIRS // 2, 2)))
    words = first | (second << BITS)
    if BITS == 8:
        first, second = tl.split(tl.reshape(words, (ROWS, PAIRS // 4, 2)))
        words = first | (second << 16)
    return words


@triton.jit
def store_words(address, row_bytes, words, row_ok, ROWS: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr):
    base = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
    row_words = tl.multiple_of(row_bytes >> 2, 4)
    word = tl.arange(0, WORDS)[None, :]
    at = base + tl.arange(0, ROWS)[:, None] * row_words + word
    if MASKED:
        tl.store(at, words, mask=row_ok & (word < row_words))
    else:
        tl.store(at, words)


@triton.jit
def scatter_pairs(address, row_bytes, pairs, row, col, rows, cols, FP4: tl.constexpr):
    """Writes the bytes of a tile at an edge, one by one. ``row`` and ``col`` count from ``address``."""
    row_ok = ((row >= 0) & (row < rows))[:, None]
    base = address.to(tl.pointer_type(tl.uint8)) + row[:, None] * row_bytes
    if FP4:
        mask = row_ok & ((col >= 0) & (col < cols))[None, :]
        tl.store(base + (col >> 1)[None, :], pairs.to(tl.uint8), mask=mask)
    else:
        at = base + col[None, :]
        tl.store(at, (pairs & 0xFF).to(tl.uint8), mask=row_ok & ((col >= 0) & (col < cols))[None, :])
        tl.store(at + 1, (pairs >> 8).to(tl.uint8), mask=row_ok & ((col >= -1) & (col + 1 < cols))[None, :])


@triton.jit
def emit(
    result,
    address,
    wire_word,
    pairs,
    first_row,
    first_col,
    rows,
    cols,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    FP4: tl.constexpr,
    FULL: tl.constexpr,
    COUNTED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Writes a tile of codes to the packed box at ``address`` and adds its digest; ``MASKED`` rows may end early."""
    SHIFT: tl.constexpr = 1 if FP4 else 0  # codes in a byte
    WORDS: tl.constexpr = PAIRS // 4 if FP4 else PAIRS // 2
    row_bytes = cols >> SHIFT
    words = words_of_pairs(pairs, 8 if FP4 else 16, ROWS, PAIRS)
    offset = first_row * row_bytes + (first_col >> SHIFT)
    row = first_row + tl.arange(0, ROWS)
    if FULL:
        store_words(address + offset, row_bytes, words, (row < rows)[:, None], ROWS, WORDS, MASKED)
    else:
        col = first_col + 2 * tl.arange(0, PAIRS)
        scatter_pairs(address, row_bytes, pairs, row, col, rows, cols, FP4)
    if COUNTED:
        low, high = tl.split(tl.reshape(words, (ROWS, WORDS // 2, 2)))
        row_word = wire_word + (offset >> 3).to(tl.uint64, bitcast=True)
        terms = digest_of_words(low, high, row_word, (row_bytes >> 3).to(tl.uint64), ROWS, WORDS // 2)
        if MASKED or not FULL:
            byte = (first_col >> SHIFT) + 8 * tl.arange(0, WORDS // 2)
            inside = ((row >= 0) & (row < rows))[:, None] & ((byte >= 0) & (byte < row_bytes))[None, :]
            terms = tl.where(inside, terms, 0)
        add_digest(result, terms)
