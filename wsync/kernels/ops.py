"""The compiled operations, typed and checked. See the package's docstring for threads and memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.errors import ConfigError
from wsync.native import load_extension
from wsync.plan.descriptors import AMAX_DESC, PACK_DESC, TRANSFORM_DESC, UNPACK_DESC
from wsync.plan.sink_program import Fill

_C = load_extension()

Descriptors = npt.NDArray[np.void]
"""A vector of one of the dtypes of `wsync.plan.descriptors`."""

WORD_BYTES = 8
"""Bytes of one digest word."""


class PackResult(NamedTuple):
    """What `pack` found.

    Attributes:
        digest: of the words that the pieces occupy; add `padding_digest` for the digest of the whole bucket.
        bad: ``(piece_idx, index)`` of the first non-finite element (of the lowest descriptor, at the lowest packed
            index in its box), or None. The bucket's bytes are unspecified if there is one.
    """

    digest: int
    bad: tuple[int, int] | None


def _checked(descs: Descriptors, dtype: np.dtype[Any], name: str) -> Descriptors:
    if descs.dtype != dtype:
        raise ConfigError(f"the descriptors must have the dtype {name}, but they have {descs.dtype}")
    return descs


def pack(descs: Descriptors, dst_base: int, num_threads: int = 0, *, isa: str = "auto") -> PackResult:
    """Gather, check, quantise and write every box into the bucket at ``dst_base``, in one pass.

    Args:
        descs: vector of `PACK_DESC`. All operations refuse values that are NaN or infinite (``OP_COPY`` only where
            ``src_dtype`` is a float's), the others also those that become infinite when they are rounded to bf16. The
            scaled operations read the scales at ``scales`` (``OP_FP8_SCALED``, ``OP_FP8_CHANNEL_SCALED``) or write them
            (the others, but for ``OP_FP8_TENSOR``, which has none); ``OP_FP8_TENSOR`` and ``OP_NVFP4`` read ``amax``.
        dst_base: address of the bucket. Bytes between pieces are not touched: the caller zeroes them once.
        num_threads: see the package.
        isa: see the package.

    Raises:
        ConfigError: a descriptor is malformed; nothing was written.
    """
    digest, bad = _C.pack(_checked(descs, PACK_DESC, "PACK_DESC"), dst_base, num_threads, isa)
    return PackResult(digest, bad)


def amax(descs: Descriptors, num_threads: int = 0, *, isa: str = "auto") -> tuple[int, int] | None:
    """Raise each amax cell to the largest magnitude of its scale block's part in the box, ``SRC_F32`` rounded first.

    Args:
        descs: vector of `AMAX_DESC`. Cells (f32, not negative, zeroed by the caller) may be shared by descriptors: one
            for each 128 x 128 block, for each row (``OP_FP8_CHANNEL``) or for the box (``OP_FP8_TENSOR``,
            ``OP_NVFP4``).
        num_threads: see the package.
        isa: see the package.

    Returns:
        ``(descriptor index, packed index in its box)`` of the first non-finite element, or None.

    Raises:
        ConfigError: a descriptor is malformed; nothing was written.
    """
    bad: tuple[int, int] | None = _C.amax(_checked(descs, AMAX_DESC, "AMAX_DESC"), num_threads, isa)
    return bad


def scales_from_amax(descs: Descriptors) -> None:
    """Write the scale of every block that the boxes touch, from its amax cell by the rule of ``recipe_op``.

    Raises:
        ConfigError: a descriptor is malformed; nothing was written.
    """
    _C.scales_from_amax(_checked(descs, AMAX_DESC, "AMAX_DESC"))


def unpack(descs: Descriptors, src_base: int, num_threads: int = 0, *, isa: str = "auto") -> int:
    """Scatter every box of the bucket at ``src_base`` into engine memory: copied, filled, or as exponents of scales.

    Returns:
        The digest of the words written, in packed order of the boxes, taken as they are read. A descriptor whose
        ``wire_word`` is ``2**64 - 1`` is copied and not counted: a second destination of the same piece.

    Raises:
        ConfigError: a descriptor is malformed; nothing was written.
    """
    digest_: int = _C.unpack(_checked(descs, UNPACK_DESC, "UNPACK_DESC"), src_base, num_threads, isa)
    return digest_


def installed_digest(descs: Descriptors, num_threads: int = 0, *, isa: str = "auto") -> int:
    """Digest of what lies at the destinations of ``descs`` now: equals that of `unpack` if nothing changed since.

    Raises:
        ConfigError: a descriptor is malformed.
    """
    digest_: int = _C.installed_digest(_checked(descs, UNPACK_DESC, "UNPACK_DESC"), num_threads, isa)
    return digest_


def transform(descs: Descriptors, num_threads: int = 0, *, isa: str = "auto") -> tuple[int, int] | None:
    """Decode every matrix of staged codes and scales, and write it as floats or requantised to engine memory.

    Args:
        descs: vector of `TRANSFORM_DESC`. A requantisation may write over its own codes and scales.
        num_threads: see the package.
        isa: see the package.

    Returns:
        ``(piece_idx, packed index in its matrix)`` of the first decoded weight of a requantisation that is not finite
        (its destination is unspecified then), or None. Dequantised values are written as they are.

    Raises:
        ConfigError: a descriptor is malformed; nothing was written.
    """
    bad: tuple[int, int] | None = _C.transform(_checked(descs, TRANSFORM_DESC, "TRANSFORM_DESC"), num_threads, isa)
    return bad


def mismatched_duplicate(fill: Fill, bucket_pos: int, num_threads: int = 0, *, isa: str = "auto") -> int | None:
    """Compare what lies at the further destinations of a bucket's pieces now with what lies at the first ones.

    `installed_digest` of the bucket's own descriptors leaves the further destinations out.

    Args:
        fill: that was unpacked.
        bucket_pos: position of the bucket in the fill.
        num_threads: see the package.
        isa: see the package.

    Returns:
        Index into ``fill.duplicates[bucket_pos]`` of the first one that differs, or None.
    """
    duplicates = fill.duplicates[bucket_pos]
    if len(duplicates.descs) == 0:
        return None
    firsts = fill.buckets[bucket_pos][duplicates.first_idx]
    if installed_digest(duplicates.descs, num_threads, isa=isa) == installed_digest(firsts, num_threads, isa=isa):
        return None
    for i in range(len(firsts)):
        one = slice(i, i + 1)
        here = installed_digest(duplicates.descs[one], num_threads, isa=isa)
        if here != installed_digest(firsts[one], num_threads, isa=isa):
            return i
    return None


def digest(address: int, nbytes: int, first_word: int, num_threads: int = 0, *, isa: str = "auto") -> int:
    """Digest of ``nbytes`` contiguous bytes whose first word has the logical index ``first_word``.

    A last partial word is padded with zeros. Source of the formula: `wsync.formats.digest`.
    """
    digest_: int = _C.digest(address, nbytes, first_word, num_threads, isa)
    return digest_


def zero_digest(first_word: int, num_words: int) -> int:
    """Digest of ``num_words`` words of zeros from the logical index ``first_word`` on."""
    digest_: int = _C.zero_digest(first_word, num_words)
    return digest_


def padding_digest(used_bytes: int, pieces: Iterable[tuple[int, int]], first_word: int) -> int:
    """Digest of the zero words of a bucket that belong to no piece.

    A constant of the plan: the digest of the bucket's ``[0, used_bytes)`` is this plus that of `pack`, modulo 2^64.

    Args:
        used_bytes: of the bucket, a multiple of 8.
        pieces: ``(offset, nbytes)`` of every piece; the offsets are multiples of 8, the pieces do not overlap.
        first_word: logical index of the bucket's first word: ``bucket_idx * bucket_bytes / 8``.

    Raises:
        ConfigError: an offset is not a multiple of 8, or pieces overlap or reach beyond ``used_bytes``.
    """
    if used_bytes % WORD_BYTES:
        raise ConfigError(f"used_bytes must be a multiple of {WORD_BYTES}, but it is {used_bytes}")
    total, word = 0, 0
    for offset, nbytes in sorted(pieces):
        begin, partial = divmod(offset, WORD_BYTES)
        if partial or begin < word:
            raise ConfigError(
                f"a piece begins at byte {offset}: not a multiple of {WORD_BYTES}, or before byte {word * 8}"
            )
        total += zero_digest(first_word + word, begin - word)
        word = begin + -(-nbytes // WORD_BYTES)
    if word * WORD_BYTES > used_bytes:
        raise ConfigError(f"the pieces end at byte {word * WORD_BYTES}, beyond used_bytes {used_bytes}")
    total += zero_digest(first_word + word, used_bytes // WORD_BYTES - word)
    return total & 0xFFFFFFFFFFFFFFFF


def memcpy(dst: int, src: int, nbytes: int, num_threads: int = 0) -> None:
    """Copy ``nbytes``: the C library's ``memcpy``, cut into bands for several threads. The limit of benchmarks."""
    _C.memcpy(dst, src, nbytes, num_threads)


def best_isa() -> str:
    """The instruction set that ``isa="auto"`` means on this machine, now."""
    name: str = _C.best_isa()
    return name


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine has, the widest last."""
    return tuple(_C.isas())


def num_processors() -> int:
    """Processors that this process may run on: what ``num_threads=0`` means."""
    count: int = _C.num_processors()
    return count
