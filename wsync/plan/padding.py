"""The bytes of a bucket that no piece occupies. They are zero, travel with it, and count in its digest.

Source: ``csrc/core/digest.h``, of which this is the case of zero words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsync.plan.types import Bucket

WORD_BYTES = 8
_KEY = np.uint64(0x9E3779B97F4A7C15)


def padding_ranges(bucket: Bucket) -> list[tuple[int, int]]:
    """Byte ranges ``(begin, end)`` from the bucket's base that belong to no piece's words.

    A piece's last word is padded with zeros and counted with the piece, so ranges begin and end on words.
    """
    ranges = []
    begin = 0
    for piece in bucket.pieces:
        if piece.offset > begin:
            ranges.append((begin, piece.offset))
        begin = -(-(piece.offset + piece.nbytes) // WORD_BYTES) * WORD_BYTES
    if bucket.used_bytes > begin:
        ranges.append((begin, bucket.used_bytes))
    return ranges


def padding_digest(bucket: Bucket, bucket_bytes: int, begin: int = 0, end: int | None = None) -> int:
    """What those ranges that begin in ``[begin, end)`` add to the bucket's digest, modulo 2^64."""
    first = bucket.bucket_idx * (bucket_bytes // WORD_BYTES)
    end = bucket.used_bytes if end is None else end
    ranges = [(b, e) for b, e in padding_ranges(bucket) if begin <= b < end]
    words = [np.arange(first + b // 8, first + e // 8, dtype=np.uint64) for b, e in ranges]
    return zero_digest(np.concatenate(words)) if words else 0


def zero_digest(word_idx: npt.NDArray[np.uint64]) -> int:
    """The digest of zero words at the logical word indices ``word_idx``."""
    x = (word_idx + np.uint64(1)) * _KEY
    total = (x & np.uint64(0xFFFFFFFF)) * (x >> np.uint64(32)) + x
    return int(total.sum(dtype=np.uint64))
