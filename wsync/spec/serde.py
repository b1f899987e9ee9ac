"""The only untyped boundary: strict encoding and decoding of the values of `wsync.spec`, and digests of them."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from wsync.errors import FormatVersionError, WireError

T = TypeVar("T")

FORMAT_VERSION = 3
"""Version of every message and file that wsync writes."""


def encode(value: object) -> bytes:
    """MessagePack bytes of a Struct. Equal values give equal bytes (dicts and sets are sorted)."""
    return msgspec.msgpack.encode(value, order="deterministic")


def decode(data: bytes, kind: type[T], *, max_bytes: int = 1 << 30) -> T:
    """Decode ``data`` as ``kind``, strictly.

    Raises:
        WireError: too long, truncated, not MessagePack, unknown fields or wrong types, or text that is not UTF-8.
    """
    if len(data) > max_bytes:
        raise WireError(f"a {kind.__name__} of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (ValueError, RecursionError) as e:  # msgspec's own errors are ValueErrors, and so are UTF-8's
        raise WireError(f"{len(data)} bytes do not decode as {kind.__name__}: {e}") from e


def digest_of(value: object) -> str:
    """Hex digest (BLAKE2b, 128 bits) of a Struct's encoding."""
    return hashlib.blake2b(encode(value), digest_size=16).hexdigest()


def check_format(got: Any, what: str) -> None:
    """Refuse a file or message of another format version.

    Raises:
        FormatVersionError: with both versions.
    """
    if got != FORMAT_VERSION:
        raise FormatVersionError(f"{what} has format version {got!r}, this wsync reads version {FORMAT_VERSION}")
