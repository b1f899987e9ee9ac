"""The digest against its definition in numpy, and what it must notice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import ISAS, bucket

from wsync import kernels
from wsync.errors import ConfigError
from wsync.formats import digest_bytes

MASK = (1 << 64) - 1


def by_hand(data: bytes, first_word: int) -> int:
    """The formula with Python's integers: shares nothing with numpy or C++."""
    total = 0
    for k in range(0, len(data), 8):
        word = int.from_bytes(data[k : k + 8].ljust(8, b"\0"), "little")
        x = word ^ ((first_word + k // 8 + 1) * 0x9E3779B97F4A7C15 & MASK)
        total += (x & 0xFFFFFFFF) * (x >> 32) + x
    return total & MASK


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=700), first_word=st.integers(0, 1 << 40), shift=st.integers(0, 9))
def test_digest_equals_the_formula_for_any_length_and_alignment(data, first_word, shift):
    expected = by_hand(data, first_word)
    assert digest_bytes(data, first_word) == expected
    raw = bucket(len(data) + 16)
    raw[shift : shift + len(data)] = np.frombuffer(data, np.uint8)
    for isa in ISAS:
        assert kernels.digest(raw.ctypes.data + shift, len(data), first_word, 1, isa=isa) == expected


def test_digest_is_the_same_for_every_number_of_threads():
    data = np.random.default_rng(1).integers(0, 256, size=(5 << 20) + 13, dtype=np.uint8)
    expected = digest_bytes(data, 77)
    for isa in ISAS:
        for num_threads in (1, 2, 3, 0):
            assert kernels.digest(data.ctypes.data, len(data), 77, num_threads, isa=isa) == expected


def test_every_flipped_bit_changes_the_digest():
    data = np.random.default_rng(2).integers(0, 256, size=256, dtype=np.uint8)
    data[:64] = 0
    data[64:128] = 255
    before = kernels.digest(data.ctypes.data, len(data), 9)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << (bit % 8)
        assert kernels.digest(data.ctypes.data, len(data), 9) != before
        data[bit // 8] ^= 1 << (bit % 8)
    assert kernels.digest(data.ctypes.data, len(data), 9) == before


def test_swapped_words_and_shifted_words_change_the_digest():
    words = np.random.default_rng(3).integers(0, 1 << 63, size=64, dtype=np.uint64)
    before = kernels.digest(words.ctypes.data, words.nbytes, 0)
    for i, j in ((0, 1), (0, 4), (3, 60), (8, 16)):
        swapped = words.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert kernels.digest(swapped.ctypes.data, swapped.nbytes, 0) != before
    assert kernels.digest(words.ctypes.data, words.nbytes, 1) != before


def test_digests_of_parts_add_up_to_the_digest_of_the_whole():
    data = np.random.default_rng(4).integers(0, 256, size=4096, dtype=np.uint8)
    parts = sum(kernels.digest(data.ctypes.data + at, 512, 100 + at // 8) for at in range(0, 4096, 512))
    assert parts & MASK == kernels.digest(data.ctypes.data, 4096, 100)


def test_padding_digest_is_that_of_the_zero_words_between_pieces():
    pieces = [(1024, 77), (0, 300), (512, 256)]
    zeros = np.zeros(2048, np.uint8)
    covered = sum(digest_bytes(zeros[:nbytes], (offset // 8) + 5) for offset, nbytes in pieces)
    expected = (digest_bytes(zeros, 5) - covered) & MASK
    assert kernels.padding_digest(2048, pieces, 5) == expected
    assert kernels.padding_digest(2048, [], 5) == digest_bytes(zeros, 5) == kernels.zero_digest(5, 256)


@pytest.mark.parametrize(("used", "pieces"), [(2047, []), (64, [(3, 8)]), (64, [(0, 16), (8, 8)]), (64, [(56, 16)])])
def test_padding_digest_refuses_pieces_that_cannot_be(used, pieces):
    with pytest.raises(ConfigError):
        kernels.padding_digest(used, pieces, 0)
