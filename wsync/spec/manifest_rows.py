"""How many rows the tables of a manifest file have, counted before a single one becomes an object."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from wsync.errors import ManifestError, WireError
from wsync.spec.serde import decode

T = TypeVar("T")

MAX_ROWS = 1 << 22
"""Of all tables together; Kimi-K2 on 16 engine ranks that cut each expert has 1.5 million."""
MAX_COPIES = 1 << 22
MAX_LISTS = 1 << 24
"""Of boxes, one for each rank and kind of tensor."""
MAX_KINDS = 1 << 17
"""Of ranks with different memory."""


class _RawSource(msgspec.Struct, array_like=True):
    ranks: msgspec.Raw
    tensors: msgspec.Raw
    boxes: msgspec.Raw
    held: msgspec.Raw
    shards: msgspec.Raw
    shards_of: msgspec.Raw


class _RawSink(msgspec.Struct, array_like=True):
    names: msgspec.Raw
    roles: msgspec.Raw
    boxes: msgspec.Raw
    strides: msgspec.Raw
    memories: msgspec.Raw
    ranks: msgspec.Raw


class _RawMemory(msgspec.Struct, array_like=True):
    recipe_of: msgspec.Raw
    storages: msgspec.Raw
    scale_groups: msgspec.Raw
    tensor: msgspec.Raw


def check_source_rows(body: bytes, name: str) -> None:
    """Refuse what would be many times as large once it is objects, before there is any.

    Raises:
        ManifestError: with what it has and what is allowed.
    """
    raw = decoded(body, _RawSource, name)
    fields = (raw.ranks, raw.tensors, raw.boxes, raw.held, raw.shards, raw.shards_of)
    _check_count(sum(map(_length, fields)), MAX_ROWS, "rows", name)
    _check_count(_length(raw.ranks) * _length(raw.shards), MAX_LISTS, "lists of boxes", name)


def check_sink_rows(body: bytes, name: str) -> None:
    """The same for engines. Raises as `check_source_rows`."""
    raw = decoded(body, _RawSink, name)
    fields = (raw.names, raw.roles, raw.boxes, raw.strides, raw.memories, raw.ranks)
    num_rows = sum(map(_length, fields))
    _check_count(_length(raw.memories), MAX_KINDS, "kinds of ranks", name)
    memories = decoded(bytes(raw.memories), tuple[_RawMemory, ...], name)
    num_rows += sum(_length(m.recipe_of) + _length(m.storages) + _length(m.scale_groups) for m in memories)
    _check_count(num_rows, MAX_ROWS, "rows", name)
    _check_count(sum(_length(m.tensor) for m in memories), MAX_COPIES, "copies", name)


def _check_count(count: int, allowed: int, what: str, name: str) -> None:
    if count > allowed:
        raise ManifestError(f"{name} has {count} {what}, allowed are {allowed}")


def _length(raw: msgspec.Raw) -> int:
    """Of a MessagePack array; 0 of what is none. Source: MessagePack specification, "array format family"."""
    head = bytes(memoryview(raw)[:5])
    if 0x90 <= head[0] <= 0x9F:
        return head[0] & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(head[0], 0)
    return int.from_bytes(head[1 : 1 + width], "big")


def decoded(body: bytes, kind: type[T], name: str) -> T:
    """Decode a part of a manifest file.

    Raises:
        ManifestError: it is something else.
    """
    try:
        return decode(body, kind)
    except WireError as e:
        raise ManifestError(f"{name} is not what it says it is: {e.message}") from e
