"""Compile an engine rank's slice to descriptors that are bound to its live memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsync.errors import DtypeMismatchError, ManifestError
from wsync.plan.descriptors import UNPACK_DESC, descriptor_dims
from wsync.plan.padding import WORD_BYTES, padding_digest, padding_ranges
from wsync.plan.source_program import DescArray
from wsync.plan.types import Bucket, Piece, SinkSlice, WirePart
from wsync.spec.dtypes import itemsize, same_bytes
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


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The further destinations of a bucket's pieces: a piece that two copies take has a first one and these.

    Attributes:
        descs: array of UNPACK_DESC with the pieces' own digest keys, so that each has the digest of its first one.
        first_idx: for each the index of the first destination's descriptor in the bucket.
        storages: for each the name of the storage that holds it.
    """

    descs: DescArray
    first_idx: npt.NDArray[np.intp]
    storages: tuple[str, ...]


@dataclass(slots=True)
class SinkProgram:
    """What an engine rank replays at each commit. Holds no reference to the engine's memory.

    Attributes:
        slice_: that was compiled.
        buckets: for each bucket position a contiguous array of UNPACK_DESC; every byte of every piece is counted in the
            digest by exactly one of them.
        duplicates: for each bucket position the descriptors that ``buckets`` does not count, made to be counted.
        padding: for each bucket position the byte ranges that no piece occupies.
        padding_digests: what they add to the bucket's digest.
    """

    slice_: SinkSlice
    buckets: list[DescArray]
    duplicates: list[Duplicates]
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
    compiled = [compiler.bucket(b) for b in slice_.buckets]
    compiler.check_filled()
    return SinkProgram(
        slice_=slice_,
        buckets=[descs for descs, _ in compiled],
        duplicates=[_duplicates(descs, storages) for descs, storages in compiled],
        padding=[padding_ranges(b) for b in slice_.buckets],
        padding_digests=[padding_digest(b, slice_.bucket_bytes) for b in slice_.buckets],
    )


def _check_storages(manifest: SinkRankManifest, storages: Sequence[StorageMemory]) -> None:
    if len(storages) != len(manifest.storages):
        raise ManifestError(f"memory is given for {len(storages)} storages, the manifest has {len(manifest.storages)}")
    for spec, memory in zip(manifest.storages, storages, strict=True):
        if not same_bytes(spec.dtype, memory.dtype):
            raise DtypeMismatchError(f"storage {spec.name!r} is {memory.dtype} in memory, {spec.dtype} in the manifest")
        if memory.num_elements < spec.num_elements:
            raise ManifestError(
                f"storage {spec.name!r} has {memory.num_elements} elements in memory, "
                f"{spec.num_elements} in the manifest"
            )


def _duplicates(descs: DescArray, storages: Sequence[str]) -> Duplicates:
    uncounted = np.flatnonzero(descs["wire_word"] == UNCOUNTED_WORD)
    counted = np.flatnonzero(descs["wire_word"] != UNCOUNTED_WORD)
    first_idx = counted[np.searchsorted(counted, uncounted) - 1]
    made = descs[uncounted]
    made["wire_word"] = descs["wire_word"][first_idx]
    return Duplicates(made, first_idx, tuple(storages[i] for i in uncounted.tolist()))


def _part_key(part: WirePart) -> PartKey:
    name = part.name.removesuffix(get_recipe(part.recipe).scale_suffix) if part.role == "scale" else part.name
    return name, part.recipe, part.role


class _SinkCompiler:
    def __init__(self, slice_: SinkSlice, manifest: SinkRankManifest, storages: Sequence[StorageMemory]) -> None:
        self.slice = slice_
        self.storages = storages
        self.storage_names = [s.name for s in manifest.storages]
        self.where = f"rank {manifest.rank} of replica {manifest.replica!r}"
        self.copies = [c for c in manifest.copies if c.box.num_elements]
        self.filled = [0] * len(self.copies)
        by_key: dict[PartKey, list[int]] = {}
        for i, copy in enumerate(self.copies):
            name = slice_.aliases.get(copy.tensor, copy.tensor)
            by_key.setdefault((name, manifest.recipes[copy.tensor], copy.role), []).append(i)
        self.copies_of = [by_key.get(_part_key(p), []) for p in slice_.parts]

    def bucket(self, bucket: Bucket) -> tuple[DescArray, list[str]]:
        """Descriptors, and for each the name of the storage that it writes."""
        rows: list[tuple[object, ...]] = []
        storages: list[str] = []
        base = bucket.bucket_idx * (self.slice.bucket_bytes // WORD_BYTES)
        for piece in bucket.pieces:
            for row, storage in self._piece(piece, base + piece.offset // WORD_BYTES):
                rows.append((*row, len(rows)))
                storages.append(storage)
        return np.array(rows, UNPACK_DESC), storages

    def _piece(self, piece: Piece, word: int) -> list[tuple[tuple[object, ...], str]]:
        part = self.slice.parts[piece.part_idx]
        elem_bytes = itemsize(part.dtype)
        rows: list[tuple[tuple[object, ...], str]] = []
        for i in self.copies_of[piece.part_idx]:
            copy = self.copies[i]
            if not copy.box.contains(piece.box):
                continue
            self.filled[i] += piece.box.num_elements
            strides, extents = descriptor_dims(copy.dst_strides, piece.box.shape, part.name)
            counted = UNCOUNTED_WORD if rows else word
            dst = self._address(copy, piece, elem_bytes)
            row = (dst, strides, extents, piece.offset, counted, elem_bytes)
            rows.append((row, self.storage_names[copy.storage_idx]))
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
