"""Strided copies: what a layout comes down to, and what descriptors execute. Plain integers, no addresses, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.plan.descriptors import (
    NUM_DIMS,
    UNPACK_COPY,
    UNPACK_DESC,
    UNPACK_EXPONENT,
    UNPACK_FILL,
    descriptor_dims,
)
from wsync.plan.padding import WORD_BYTES

_F32_BYTES = 4


class StridedCopy(NamedTuple):
    """Elements that go from one strided place to another, or that are filled. All numbers count elements.

    Attributes:
        op: `UNPACK_COPY`, `UNPACK_FILL` (reads nothing) or `UNPACK_EXPONENT` (f32 powers of two to E8M0 bytes).
        src_offset: of the first element, from the beginning of the packed source.
        src_strides: outer to inner, at most four; 0 repeats an element.
        dst_offset: of the first element, from the beginning of the destination.
        dst_strides: outer to inner.
        extents: outer to inner.
        fill: the value that a fill writes, as an unsigned integer of the element's size.
    """

    op: int
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]
    extents: tuple[int, ...]
    fill: int = 0

    @property
    def num_elements(self) -> int:
        """How many elements are written."""
        return int(np.prod(self.extents, dtype=np.int64))


class Digit(NamedTuple):
    """One dimension of a run of strided elements.

    Attributes:
        extent: how many.
        src, dst: strides in elements.
    """

    extent: int
    src: int
    dst: int


class Piece(NamedTuple):
    """A strided part of one axis: its first element's offsets and its digits, outer to inner."""

    src: int
    dst: int
    digits: tuple[Digit, ...]


def strided_pieces(src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64]) -> list[Piece]:
    """Cover the pairs ``(src[i], dst[i])`` by strided pieces: few where the order is regular at any number of levels.

    Runs of a constant step become one piece with a digit, then runs of equal pieces, and so on.
    """
    starts = np.stack([src, dst], axis=1)
    kinds = np.zeros(len(starts), np.int64)
    shapes: list[tuple[Digit, ...]] = [()]
    while True:
        bounds = _runs(starts, kinds)
        if len(bounds) - 1 == len(starts):
            return [Piece(int(s), int(d), shapes[k]) for (s, d), k in zip(starts.tolist(), kinds.tolist(), strict=True)]
        found: dict[tuple[Digit, ...], int] = {}
        new_kinds = np.empty(len(bounds) - 1, np.int64)
        for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
            digits = shapes[kinds[begin]]
            if end - begin > 1:
                step = (starts[begin + 1] - starts[begin]).tolist()
                digits = (Digit(end - begin, *step), *digits)
            new_kinds[i] = found.setdefault(digits, len(found))
        starts, kinds, shapes = starts[bounds[:-1]], new_kinds, list(found)


def _runs(starts: npt.NDArray[np.int64], kinds: npt.NDArray[np.int64]) -> list[int]:
    """Bounds of maximal runs of equal kind and constant step; a lone first element does not take a longer run's."""
    count = len(starts)
    if count < 2:
        return list(range(count + 1))
    steps = np.diff(starts, axis=0)
    joins = kinds[1:] == kinds[:-1]
    same = np.concatenate([(steps[1:] == steps[:-1]).all(axis=1) & joins[1:] & joins[:-1], [False]])
    ends = np.flatnonzero(~same)  # ends[j] is the last of a stretch of equal steps: element ends[j] + 1 is its last
    bounds, at = [0], 0
    for j, last_step in enumerate(ends.tolist()):
        if at > last_step:
            continue
        is_lone = at == last_step and j + 1 < len(ends) and ends[j + 1] > last_step + 1
        at = at + 1 if is_lone or not joins[at] else last_step + 2
        bounds.append(at)
    if bounds[-1] < count:
        bounds.append(count)
    return bounds


def product_copies(
    op: int, axes: Sequence[Sequence[Piece]], src_offset: int = 0, dst_offset: int = 0, fill: int = 0
) -> Iterator[StridedCopy]:
    """The copies of all combinations of the axes' pieces, whose offsets add up."""
    for pieces in itertools.product(*axes):
        src = src_offset + sum(p.src for p in pieces)
        dst = dst_offset + sum(p.dst for p in pieces)
        yield from _with_four_dims(op, src, dst, _merged([d for p in pieces for d in p.digits]), fill)


def _merged(digits: Sequence[Digit]) -> list[Digit]:
    """Without digits of one element, neighbours joined that are one run."""
    out: list[Digit] = []
    for digit in digits:
        if digit.extent == 1:
            continue
        if out and (out[-1].src, out[-1].dst) == (digit.src * digit.extent, digit.dst * digit.extent):
            digit = Digit(out.pop().extent * digit.extent, digit.src, digit.dst)
        out.append(digit)
    return out


def _with_four_dims(op: int, src: int, dst: int, digits: list[Digit], fill: int) -> Iterator[StridedCopy]:
    """One copy, or one for each index of the shortest outer digits where a descriptor has too few dimensions."""
    if len(digits) <= NUM_DIMS:
        src_strides, dst_strides = tuple(d.src for d in digits), tuple(d.dst for d in digits)
        yield StridedCopy(op, src, src_strides, dst, dst_strides, tuple(d.extent for d in digits), fill)
        return
    split = min(range(len(digits) - 1), key=lambda i: digits[i].extent)
    rest = _merged([*digits[:split], *digits[split + 1 :]])
    for i in range(digits[split].extent):
        yield from _with_four_dims(op, src + i * digits[split].src, dst + i * digits[split].dst, rest, fill)


def unpack_descs(
    copies: Sequence[StridedCopy],
    dst_address: int,
    src_offset: int,
    wire_word: int,
    elem_bytes: int,
    piece_idx: int = 0,
) -> npt.NDArray[np.void]:
    """Descriptors that execute ``copies``.

    Each counts the bytes that it writes in the digest under words of its own, from ``wire_word`` on, so that the digest
    of unpacking and that of what is installed agree. It is not the digest of the wire's bytes.

    Args:
        copies: of one part, disjoint at the destination.
        dst_address: of the destination's first element.
        src_offset: bytes from the bucket's base to the source's first element.
        wire_word: digest key of the first word; `digest_words_of` says how many are used.
        elem_bytes: of one element at the destination: 1, 2 or 4 where something is filled. An exponent's source is f32.
        piece_idx: of every descriptor.

    Returns:
        One-dimensional array of UNPACK_DESC.
    """
    descs = np.zeros(len(copies), UNPACK_DESC)
    word = wire_word
    for desc, copy in zip(descs, copies, strict=True):
        _fill_in(desc, copy, dst_address, src_offset, elem_bytes)
        desc["wire_word"], desc["piece_idx"] = word, piece_idx
        word += _num_words(copy, elem_bytes)
    return descs


def _fill_in(desc: Any, copy: StridedCopy, dst_address: int, src_offset: int, elem_bytes: int) -> None:
    src_bytes = _F32_BYTES if copy.op == UNPACK_EXPONENT else elem_bytes
    dst_strides, extents = descriptor_dims(copy.dst_strides, copy.extents, "a layout")
    src_strides, _ = descriptor_dims(copy.src_strides, copy.extents, "a layout")
    desc["dst"] = dst_address + copy.dst_offset * elem_bytes
    desc["dst_stride"], desc["src_stride"], desc["extent"] = dst_strides, src_strides, extents
    desc["src_offset"] = 0 if copy.op == UNPACK_FILL else src_offset + copy.src_offset * src_bytes
    desc["elem_bytes"] = 1 if copy.op == UNPACK_EXPONENT else elem_bytes
    desc["op"], desc["fill"] = copy.op, copy.fill


def _num_words(copy: StridedCopy, elem_bytes: int) -> int:
    return -(-copy.num_elements * (1 if copy.op == UNPACK_EXPONENT else elem_bytes) // WORD_BYTES)


def digest_words_of(copies: Sequence[StridedCopy], elem_bytes: int) -> int:
    """How many digest words `unpack_descs` gives to ``copies``."""
    return sum(_num_words(copy, elem_bytes) for copy in copies)


__all__ = [
    "UNPACK_COPY",
    "UNPACK_EXPONENT",
    "UNPACK_FILL",
    "Digit",
    "Piece",
    "StridedCopy",
    "digest_words_of",
    "product_copies",
    "strided_pieces",
    "unpack_descs",
]
