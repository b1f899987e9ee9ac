"""Delta of a bucket: what changed in its bytes since a base version. See the package for threads and memory.

Source of the format: `docs/wire_format.md`; `wsync.formats.delta` is the same in plain Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.native import load_extension

_C = load_extension()

WORDS, BYTES = 2, 3
"""Kinds of stripes: elements of two bytes (bf16 and wider) and of one (fp8 codes)."""

MAX_STRIPE_BYTES: int = _C.DELTA_MAX_STRIPE_BYTES

Cuts = npt.NDArray[np.uint32]
"""``[num_stripes, 2]`` u32: bytes of each stripe and its kind; the stripes of a bucket follow each other."""


class Encoded(NamedTuple):
    """What `delta_encode` made.

    Attributes:
        num_bytes: of the code; 0 where it would not be smaller than the bucket.
        num_changed: elements that differ.
        num_elements: of the bucket.
    """

    num_bytes: int
    num_changed: int
    num_elements: int


def delta_cuts(spans: Iterable[tuple[int, int]]) -> Cuts:
    """Stripes for a bucket.

    Args:
        spans: ``(bytes, bytes of an element)`` of stretches that follow each other, multiples of 256 bytes.
    """
    rows: list[tuple[int, int]] = []
    for num_bytes, elem_bytes in spans:
        kind = BYTES if elem_bytes == 1 else WORDS
        rows += [(MAX_STRIPE_BYTES, kind)] * (num_bytes // MAX_STRIPE_BYTES)
        if rest := num_bytes % MAX_STRIPE_BYTES:
            rows.append((rest, kind))
    return np.array(rows, np.uint32).reshape(-1, 2)


def delta_encode(
    fresh: int,
    base: int,
    out: int,
    cuts: Cuts,
    base_seq: int,
    base_digest: int,
    num_threads: int = 0,
    *,
    isa: str = "auto",
) -> Encoded:
    """Encode the bucket at ``fresh`` against the one at ``base``, in one pass, and make ``base`` the same as ``fresh``.

    Args:
        fresh, base: addresses of the bucket's bytes, as long as ``cuts`` says.
        out: address of as many bytes; unspecified beyond the code.
        cuts: see `delta_cuts`.
        base_seq, base_digest: what names the base; `delta_apply` refuses any other.
        num_threads, isa: see the package.

    Raises:
        ConfigError: malformed cuts; nothing was written.
    """
    return Encoded(*_C.delta_encode(fresh, base, out, cuts, base_seq, base_digest, num_threads, isa))


def delta_apply(
    bucket: int,
    used_bytes: int,
    code: int,
    num_bytes: int,
    base_seq: int,
    base_digest: int,
    num_threads: int = 0,
    *,
    isa: str = "auto",
) -> None:
    """Make the bucket of ``used_bytes`` at ``bucket``, which is the base, the version that the code at ``code`` holds.

    Whatever the code says, only the bucket is written. It must not change meanwhile: copy it out of memory that others
    write. Compare the bucket's digest afterwards: a code may be well formed and wrong.

    Raises:
        WireError: the code is malformed, or of another base than ``base_seq`` and ``base_digest``. The bucket is of no
            known version then.
    """
    _C.delta_apply(bucket, used_bytes, code, num_bytes, base_seq, base_digest, num_threads, isa)
