"""Names, front coded: each says how much it shares with the one before. Names of layers and experts become short."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from wsync.errors import WireError

_MAX_SHARED = 255


class Names(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A list of names.

    Attributes:
        shared: for each name how many characters of the one before it begins with.
        rest: what follows these.
    """

    shared: bytes
    rest: tuple[str, ...]


def pack_names(names: Sequence[str]) -> Names:
    """Front code names, in their order."""
    shared, rest, last = bytearray(), [], ""
    for name in names:
        count = _shared(last, name)
        shared.append(count)
        rest.append(name[count:])
        last = name
    return Names(bytes(shared), tuple(rest))


def _shared(a: str, b: str) -> int:
    """How many characters two names begin with in common, by halves."""
    low, high = 0, min(len(a), len(b), _MAX_SHARED)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def unpack_names(names: Names) -> list[str]:
    """The names again.

    Raises:
        WireError: the lists do not fit together.
    """
    if len(names.shared) != len(names.rest):
        raise WireError(f"{len(names.shared)} shared lengths came with {len(names.rest)} names")
    out: list[str] = []
    last = ""
    for count, rest in zip(names.shared, names.rest, strict=True):
        if count > len(last):
            raise WireError(f"a name shares {count} characters with {last!r}, which has {len(last)}")
        last = last[:count] + rest
        out.append(last)
    return out
