"""The digest of wire bytes, in numpy: the definition that the kernels must equal.

For the little-endian 8-byte word ``w`` at logical word index ``i`` (logical wire offset / 8), all modulo 2^64::

    key = (i + 1) * 0x9E3779B97F4A7C15        x = w ^ key        f = lo32(x) * hi32(x) + x

and the digest is the sum of ``f``: pieces add up in any order, on any thread, on any rank. Bytes that do not fill a
last word are padded with zeros. `csrc/core/digest.h` shows that a flipped bit is always seen. The digest guards against
faults, not against an adversary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DIGEST_KEY = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: successive keys differ in all their bits."""

_MASK = (1 << 64) - 1


def digest_words(words: npt.NDArray[np.uint64], first_word: int) -> int:
    """Digest of ``words``, a vector of little-endian 8-byte words whose first has the logical index ``first_word``."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    with np.errstate(over="ignore"):
        index = np.arange(len(words), dtype=np.uint64) + np.uint64((first_word + 1) & _MASK)
        x = words ^ (index * np.uint64(DIGEST_KEY))
        return int(np.sum((x & low) * (x >> shift) + x, dtype=np.uint64))


def digest_bytes(data: bytes | npt.NDArray[np.uint8], first_word: int) -> int:
    """Digest of ``data`` as one run that begins at logical word ``first_word``; the last word is padded with zeros."""
    raw = np.frombuffer(data, dtype=np.uint8)
    padded = np.zeros(-(-len(raw) // 8) * 8, dtype=np.uint8)
    padded[: len(raw)] = raw
    return digest_words(padded.view("<u8"), first_word)
