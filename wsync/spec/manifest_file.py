"""Manifest files: one side's manifest, factored by class, so that 70 000 tensors on 256 ranks fit a few megabytes.

A file is one line of JSON (`Header`: what it is, its version, the length and digest of what follows), then a zlib
stream of MessagePack. Whatever ranks or tensors share is written once and is one object again after loading.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from wsync.errors import ConfigError, ManifestError, WireError
from wsync.spec.box import Box
from wsync.spec.files import write_file
from wsync.spec.manifest import (
    CopySpec,
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
)
from wsync.spec.serde import FORMAT_VERSION, check_format, decode, encode

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

SOURCE, SINK = "source", "sink"
MAX_LINE_BYTES = 4096
MAX_BODY_BYTES = 1 << 30
"""Of what is packed; a manifest of any cluster there is has a fiftieth of it."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line.

    Attributes:
        wsync_manifest: ``"source"`` or ``"sink"``.
        format_version: of the file.
        nbytes: of the MessagePack, unpacked.
        digest: BLAKE2b of it, 128 bits, in hex.
    """

    wsync_manifest: str
    format_version: int
    nbytes: int
    digest: str


class _Version(msgspec.Struct):
    wsync_manifest: str
    format_version: int


class _Source(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Boxes, what one rank holds of a tensor (boxes), what all hold (held), and that of each tensor."""

    ranks: tuple[RankInfo, ...]
    tensors: tuple[TensorSpec, ...]
    boxes: tuple[Box, ...]
    held: tuple[tuple[int, ...], ...]
    shards: tuple[tuple[int, ...], ...]
    shards_of: tuple[int, ...]


class _Rank(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    replica: str
    rank: int
    world_size: int
    info: RankInfo
    memory: int


class _Memory(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the same rank of all replicas has; copies as columns, in their order."""

    recipe_of: tuple[tuple[int, str], ...]
    storages: tuple[StorageSpec, ...]
    scale_groups: tuple[tuple[int, ...], ...]
    tensor: tuple[int, ...]
    role: tuple[int, ...]
    box: tuple[int, ...]
    storage: tuple[int, ...]
    offset: tuple[int, ...]
    strides: tuple[int, ...]


class _Sink(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    names: tuple[str, ...]
    roles: tuple[str, ...]
    boxes: tuple[Box, ...]
    strides: tuple[tuple[int, ...], ...]
    memories: tuple[_Memory, ...]
    ranks: tuple[_Rank, ...]


class _Table(Generic[H]):
    """Distinct values in order of appearance; what is one object is looked up once."""

    def __init__(self) -> None:
        self.values: list[H] = []
        self._by_value: dict[H, int] = {}
        self._by_id: dict[int, int] = {}
        self._kept: list[H] = []

    def index(self, value: H) -> int:
        found = self._by_id.get(id(value))
        if found is None:
            found = self._by_value.setdefault(value, len(self.values))
            if found == len(self.values):
                self.values.append(value)
            self._by_id[id(value)] = found
            self._kept.append(value)
        return found


def save_manifest(manifest: SourceManifest | SinkManifest, path: str | Path) -> int:
    """Write a manifest, as `write_file` does.

    Returns:
        The bytes of the file.

    Raises:
        ConfigError: it cannot be written.
    """
    kind, body = (
        (SOURCE, encode(_pack_source(manifest)))
        if isinstance(manifest, SourceManifest)
        else (SINK, encode(_pack_sink(manifest)))
    )
    header = Header(kind, FORMAT_VERSION, len(body), _digest(body))
    data = msgspec.json.encode(header) + b"\n" + zlib.compress(body, 6)
    write_file(path, data)
    return len(data)


def load_manifest(path: str | Path) -> SourceManifest | SinkManifest:
    """Read a manifest file.

    Raises:
        ConfigError: it cannot be read, or is no manifest file.
        FormatVersionError: written by another version of wsync.
        ManifestError: truncated, too long, changed, or it refers to what it does not have.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"manifest {str(path)!r} cannot be read: {e.strerror}") from e
    return decode_manifest(data, str(path))


def load_source(path: str | Path) -> SourceManifest:
    """Read a trainer's manifest. Raises as `load_manifest`, and `ManifestError` for an engine's."""
    manifest = load_manifest(path)
    if not isinstance(manifest, SourceManifest):
        raise ManifestError(f"{str(path)!r} is the manifest of a sink, needed is that of a source")
    return manifest


def load_sink(path: str | Path) -> SinkManifest:
    """Read an engine's manifest. Raises as `load_manifest`, and `ManifestError` for a trainer's."""
    manifest = load_manifest(path)
    if not isinstance(manifest, SinkManifest):
        raise ManifestError(f"{str(path)!r} is the manifest of a source, needed is that of a sink")
    return manifest


def decode_manifest(data: bytes, name: str = "manifest") -> SourceManifest | SinkManifest:
    """Read a manifest from a file's bytes; ``name`` is for messages. Raises as `load_manifest`."""
    line, newline, _ = data[:MAX_LINE_BYTES].partition(b"\n")
    try:
        version = msgspec.json.decode(line, type=_Version)
        # The version goes first: a newer file's unknown fields should read as "newer", not as a typing error.
        check_format(version.format_version, name)
        header = msgspec.json.decode(line, type=Header)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{name} ({len(data)} bytes) is not a manifest of version {FORMAT_VERSION}: {e}") from e
    if not newline or not 0 <= header.nbytes <= MAX_BODY_BYTES:
        raise ManifestError(f"{name} says that it has {header.nbytes} bytes, allowed are {MAX_BODY_BYTES}")
    body = _unpacked(data[len(line) + 1 :], header, name)
    if header.wsync_manifest == SOURCE:
        return _unpack_source(_decoded(body, _Source, name), name)
    if header.wsync_manifest == SINK:
        return _unpack_sink(_decoded(body, _Sink, name), name)
    raise ManifestError(f"{name} is of the kind {header.wsync_manifest!r}, known are {SOURCE} and {SINK}")


def _decoded(body: bytes, kind: type[T], name: str) -> T:
    try:
        return decode(body, kind)
    except WireError as e:
        raise ManifestError(f"{name} is not what it says it is: {e.message}") from e


def _unpacked(packed: bytes, header: Header, name: str) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        body = unpacker.decompress(packed, header.nbytes + 1)
    except zlib.error as e:
        raise ManifestError(f"{name} does not unpack: {e}") from e
    if len(body) != header.nbytes or not unpacker.eof or unpacker.unused_data:
        more = "more" if len(body) > header.nbytes or unpacker.unused_data else "truncated"
        raise ManifestError(f"{name} has {len(body)} bytes ({more}), its header says {header.nbytes}")
    if _digest(body) != header.digest:
        raise ManifestError(f"{name} has the digest {_digest(body)}, its header says {header.digest}")
    return body


def _digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def _pack_source(manifest: SourceManifest) -> _Source:
    boxes: _Table[Box] = _Table()
    held: _Table[tuple[Box, ...]] = _Table()
    shards: _Table[tuple[tuple[Box, ...], ...]] = _Table()
    shards_of = tuple(shards.index(s) for s in manifest.shards)
    rows = tuple(tuple(held.index(h) for h in s) for s in shards.values)
    held_boxes = tuple(tuple(boxes.index(b) for b in h) for h in held.values)
    return _Source(manifest.ranks, manifest.tensors, tuple(boxes.values), held_boxes, rows, shards_of)


def _unpack_source(packed: _Source, name: str) -> SourceManifest:
    if len(packed.shards_of) != len(packed.tensors):
        raise ManifestError(f"{name} has {len(packed.tensors)} tensors, but shards of {len(packed.shards_of)}")
    held = [tuple(_pick(packed.boxes, row, name)) for row in packed.held]
    shards = [tuple(_pick(held, row, name)) for row in packed.shards]
    return SourceManifest(packed.ranks, packed.tensors, tuple(_pick(shards, packed.shards_of, name)))


def _pack_sink(manifest: SinkManifest) -> _Sink:
    names: _Table[str] = _Table()
    roles: _Table[str] = _Table()
    boxes: _Table[Box] = _Table()
    strides: _Table[tuple[int, ...]] = _Table()
    memories: list[_Memory] = []
    found: dict[tuple[int, ...], int] = {}
    ranks = []
    for rank in manifest.ranks:
        key = (id(rank.copies), id(rank.storages), id(rank.recipes), id(rank.scale_groups))
        if key not in found:
            found[key] = len(memories)
            memories.append(_pack_memory(rank, names, roles, boxes, strides))
        ranks.append(_Rank(rank.replica, rank.rank, rank.world_size, rank.info, found[key]))
    return _Sink(
        tuple(names.values),
        tuple(roles.values),
        tuple(boxes.values),
        tuple(strides.values),
        tuple(memories),
        tuple(ranks),
    )


def _pack_memory(
    rank: SinkRankManifest,
    names: _Table[str],
    roles: _Table[str],
    boxes: _Table[Box],
    strides: _Table[tuple[int, ...]],
) -> _Memory:
    copies = rank.copies
    return _Memory(
        tuple((names.index(name), recipe) for name, recipe in rank.recipes.items()),
        rank.storages,
        tuple(tuple(names.index(name) for name in group) for group in rank.scale_groups),
        tuple(names.index(c.tensor) for c in copies),
        tuple(roles.index(c.role) for c in copies),
        tuple(boxes.index(c.box) for c in copies),
        tuple(c.storage_idx for c in copies),
        tuple(c.dst_offset for c in copies),
        tuple(strides.index(c.dst_strides) for c in copies),
    )


def _unpack_sink(packed: _Sink, name: str) -> SinkManifest:
    memories = [_unpack_memory(packed, memory, name) for memory in packed.memories]
    ranks = []
    for rank in packed.ranks:
        (memory,) = _pick(memories, (rank.memory,), name)
        ranks.append(SinkRankManifest(rank.replica, rank.rank, rank.world_size, rank.info, *memory))
    return SinkManifest(tuple(ranks))


_Unpacked = tuple[dict[str, str], tuple[StorageSpec, ...], tuple[CopySpec, ...], tuple[tuple[str, ...], ...]]


def _unpack_memory(packed: _Sink, memory: _Memory, name: str) -> _Unpacked:
    columns = (memory.tensor, memory.role, memory.box, memory.storage, memory.offset, memory.strides)
    if len({len(column) for column in columns}) > 1:
        raise ManifestError(f"{name} has columns of copies of {', '.join(str(len(c)) for c in columns)} entries")
    recipe_of = zip(_pick(packed.names, [i for i, _ in memory.recipe_of], name), memory.recipe_of, strict=True)
    copies = map(
        CopySpec,
        _pick(packed.names, memory.tensor, name),
        _pick(packed.roles, memory.role, name),
        _pick(packed.boxes, memory.box, name),
        memory.storage,
        memory.offset,
        _pick(packed.strides, memory.strides, name),
    )
    groups = tuple(tuple(_pick(packed.names, group, name)) for group in memory.scale_groups)
    return {key: recipe for key, (_, recipe) in recipe_of}, memory.storages, tuple(copies), groups


def _pick(values: Sequence[T], indices: Sequence[int], name: str) -> list[T]:
    """Values by index.

    Raises:
        ManifestError: an index that is not there.
    """
    if indices and not (min(indices) >= 0 and max(indices) < len(values)):
        bad = max(indices) if min(indices) >= 0 else min(indices)
        raise ManifestError(f"{name} refers to entry {bad} of a table of {len(values)}")
    return [values[i] for i in indices]
