"""Compile an engine rank's slice to descriptors that are bound to its live memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from wsync.errors import DtypeMismatchError, ManifestError
from wsync.plan.descriptors import UNPACK_DESC, descriptor_dims
from wsync.plan.padding import WORD_BYTES, padding_digest, padding_ranges
from wsync.plan.source_program import DescArray
from wsync.plan.types import Bucket, Piece, SinkSlice, WirePart
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import CopySpec, SinkRankManifest
from wsync.spec.recipes import get_recipe

UNCOUNTED_WORD = 2**64 - 1
"""Digest key of a descriptor that is left out of the digest: its bytes were counted by an earlier one."""

PartKey = tuple[str, str, str]
"""Name of the tensor whose bytes travel, recipe, role."""


@dataclass(frozen=True, slots=True)
class StorageMemory:
    """Where one storage of the engine lies.

    Attributes:
        address: of its first element.
        num_elements: that may be written.
        dtype: torch name.
    """

    address: int
    num_elements: int
    dtype: str


@dataclass(slots=True)
class SinkProgram:
    """What an engine rank replays at each commit. Holds no reference to the engine's memory.

    Attributes:
        slice_: that was compiled.
        buckets: for each bucket position a contiguous array of UNPACK_DESC; every byte of every piece is counted in the
            digest by exactly one of them.
        padding: for each bucket position the byte ranges that no piece occupies.
        padding_digests: what they add to the bucket's digest.
    """

    slice_: SinkSlice
    buckets: list[DescArray]
    padding: list[list[tuple[int, int]]]
    padding_digests: list[int]


def compile_sink(slice_: SinkSlice, manifest: SinkRankManifest, storages: Sequence[StorageMemory]) -> SinkProgram:
    """Bind a slice to addresses.

    Args:
        slice_: of this rank.
        manifest: that the plan was made from.
        storages: where the manifest's storages lie, in its order.

    Raises:
        ManifestError: memory that is not what the manifest says, a piece that no copy takes as a whole, or a copy that
            the slice's pieces do not fill: what is installed could not have the digest of what was published.
        DtypeMismatchError: a storage of another dtype than the manifest's.
    """
    _check_storages(manifest, storages)
    compiler = _SinkCompiler(slice_, manifest, storages)
    buckets = [compiler.bucket(b) for b in slice_.buckets]
    compiler.check_filled()
    return SinkProgram(
        slice_=slice_,
        buckets=buckets,
        padding=[padding_ranges(b) for b in slice_.buckets],
        padding_digests=[padding_digest(b, slice_.bucket_bytes) for b in slice_.buckets],
    )


def _check_storages(manifest: SinkRankManifest, storages: Sequence[StorageMemory]) -> None:
    if len(storages) != len(manifest.storages):
        raise ManifestError(f"memory is given for {len(storages)} storages, the manifest has {len(manifest.storages)}")
    for spec, memory in zip(manifest.storages, storages, strict=True):
        if spec.dtype != memory.dtype:
            raise DtypeMismatchError(f"storage {spec.name!r} is {memory.dtype} in memory, {spec.dtype} in the manifest")
        if memory.num_elements < spec.num_elements:
            raise ManifestError(
                f"storage {spec.name!r} has {memory.num_elements} elements in memory, "
                f"{spec.num_elements} in the manifest"
            )


def _part_key(part: WirePart) -> PartKey:
    name = part.name.removesuffix(get_recipe(part.recipe).scale_suffix) if part.role == "scale" else part.name
    return name, part.recipe, part.role


class _SinkCompiler:
    def __init__(self, slice_: SinkSlice, manifest: SinkRankManifest, storages: Sequence[StorageMemory]) -> None:
        self.slice = slice_
        self.storages = storages
        self.where = f"rank {manifest.rank} of replica {manifest.replica!r}"
        self.copies = [c for c in manifest.copies if c.box.num_elements]
        self.filled = [0] * len(self.copies)
        by_key: dict[PartKey, list[int]] = {}
        for i, copy in enumerate(self.copies):
            name = slice_.aliases.get(copy.tensor, copy.tensor)
            by_key.setdefault((name, manifest.recipes[copy.tensor], copy.role), []).append(i)
        self.copies_of = [by_key.get(_part_key(p), []) for p in slice_.parts]

    def bucket(self, bucket: Bucket) -> DescArray:
        rows: list[tuple[object, ...]] = []
        base = bucket.bucket_idx * (self.slice.bucket_bytes // WORD_BYTES)
        for piece in bucket.pieces:
            rows += self._piece(piece, base + piece.offset // WORD_BYTES)
        return np.array([(*row, i) for i, row in enumerate(rows)], UNPACK_DESC)

    def _piece(self, piece: Piece, word: int) -> Iterable[tuple[object, ...]]:
        part = self.slice.parts[piece.part_idx]
        elem_bytes = itemsize(part.dtype)
        rows: list[tuple[object, ...]] = []
        for i in self.copies_of[piece.part_idx]:
            copy = self.copies[i]
            if not copy.box.contains(piece.box):
                continue
            self.filled[i] += piece.box.num_elements
            strides, extents = descriptor_dims(copy.dst_strides, piece.box.shape, part.name)
            counted = UNCOUNTED_WORD if rows else word
            dst = self._address(copy, piece, elem_bytes)
            rows.append((dst, strides, extents, piece.offset, counted, elem_bytes))
        if not rows:
            raise ManifestError(
                f"{self.where} receives {piece.box} of {part.name!r}, but none of its {len(self.copies)} copies "
                f"takes it"
            )
        return rows

    def _address(self, copy: CopySpec, piece: Piece, elem_bytes: int) -> int:
        steps = zip(piece.box.offset, copy.box.offset, copy.dst_strides, strict=True)
        element = copy.dst_offset + sum((p - c) * s for p, c, s in steps)
        return self.storages[copy.storage_idx].address + elem_bytes * element

    def check_filled(self) -> None:
        for copy, filled in zip(self.copies, self.filled, strict=True):
            if filled != copy.box.num_elements:
                raise ManifestError(
                    f"{self.where} needs {copy.box.num_elements} elements of {copy.tensor!r} ({copy.role}) in "
                    f"{copy.box}, its slice brings {filled}"
                )
