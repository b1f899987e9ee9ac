"""Compile an engine rank's slice to descriptors that are bound to its memory: live memory, and scratch memory where an
engine repacks what it loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.errors import DtypeMismatchError, ManifestError
from wsync.plan.descriptors import UNPACK_COPY, UNPACK_DESC, descriptor_dims
from wsync.plan.grids import all_dims, box_of_all_dims, group_of
from wsync.plan.padding import WORD_BYTES, padding_digest
from wsync.plan.source_program import DescArray
from wsync.plan.types import Bucket, Piece, SinkSlice, WirePart
from wsync.spec.box import contiguous_strides
from wsync.spec.dtypes import itemsize, same_bytes
from wsync.spec.manifest import CopySpec, SinkRankManifest
from wsync.spec.recipes import get_recipe

UNCOUNTED_WORD = 2**64 - 1
"""Digest key of a descriptor that is left out of the digest: its bytes were counted by an earlier one."""

PartKey = tuple[str, str, tuple[str, ...], str]
"""Name of the tensor whose bytes travel, recipe, scale group, role."""


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

    Only destinations of one fill stand beside each other: in every fill a piece has a first one.

    Attributes:
        descs: array of UNPACK_DESC with the pieces' own digest keys, so that each has the digest of its first one.
        first_idx: for each the index of the first destination's descriptor in the bucket.
        storages: for each the name of the storage that holds it.
    """

    descs: DescArray
    first_idx: npt.NDArray[np.intp]
    storages: tuple[str, ...]


@dataclass(slots=True)
class Fill:
    """What is unpacked in one go: into live memory, or into the scratch memory of one repack.

    Attributes:
        positions: of the buckets that hold something of it, ascending.
        buckets: for each of them a contiguous array of UNPACK_DESC; every byte of every piece that the fill takes is
            counted in the digest by exactly one of them.
        duplicates: for each of them the descriptors that ``buckets`` does not count, made to be counted.
        padding_digests: for each of them what the bytes between the pieces add to the digest of the fill's runs.
        first_slot: of its buckets' expected digests, which follow each other; see `Run`.
    """

    positions: list[int] = field(default_factory=list)
    buckets: list[DescArray] = field(default_factory=list)
    duplicates: list[Duplicates] = field(default_factory=list)
    padding_digests: list[int] = field(default_factory=list)
    first_slot: int = 0


class Run(NamedTuple):
    """A part of a bucket whose pieces go into the same fills. The runs of a bucket are all of its used bytes.

    Their digests add up to the bucket's. Added up over the runs that one fill takes, they are the digest that unpacking
    the bucket into this fill must give; ``slots`` number these sums.

    Attributes:
        begin, end: bytes from the bucket's base.
        slots: of the sums that the run belongs to, one for each fill.
    """

    begin: int
    end: int
    slots: tuple[int, ...]


@dataclass(slots=True)
class SinkProgram(Fill):
    """What an engine rank replays at each commit. Holds no reference to the engine's memory.

    The program itself is the fill of live memory; without repacks it takes every bucket in one run.

    Attributes:
        slice_: that was compiled.
        live_storages: indices of the manifest's storages that are live memory.
        scratch: for each repack the fill of its scratch memory.
        runs: for each bucket position its runs.
        num_slots: sums that the runs make.
    """

    slice_: SinkSlice = field(kw_only=True)
    live_storages: frozenset[int] = field(kw_only=True)
    scratch: tuple[Fill, ...] = field(kw_only=True)
    runs: list[tuple[Run, ...]] = field(kw_only=True)
    num_slots: int = field(kw_only=True)


def compile_sink(
    slice_: SinkSlice,
    manifest: SinkRankManifest,
    storages: Sequence[StorageMemory],
    repacks: Sequence[frozenset[int]] = (),
) -> SinkProgram:
    """Bind a slice to addresses.

    Args:
        slice_: of this rank.
        manifest: that the plan was made from.
        storages: where the manifest's storages lie, in its order.
        repacks: for each repack the indices of the storages that are its scratch memory; all others are live memory.

    Raises:
        ManifestError: memory that is not what the manifest says, a piece that no copy takes as a whole, or a copy that
            the slice's pieces do not fill: what is installed could not have the digest of what was published; or a
            scratch storage that does not exist, belongs to two repacks, or overlaps live memory.
        DtypeMismatchError: a storage of another dtype than the manifest's.
    """
    _check_storages(manifest, storages)
    fill_of = _fill_of_each(manifest, repacks)
    _check_apart(manifest, storages, fill_of)
    compiler = _SinkCompiler(slice_, manifest, storages, fill_of)
    fills = [Fill() for _ in range(1 + len(repacks))]
    spans = [_add_bucket(compiler, pos, fills) for pos in range(len(slice_.buckets))]
    compiler.check_filled()
    num_slots = 0
    for fill in fills:
        fill.first_slot = num_slots
        num_slots += len(fill.positions)
    live, *scratch = fills
    return SinkProgram(
        live.positions,
        live.buckets,
        live.duplicates,
        live.padding_digests,
        live.first_slot,
        slice_=slice_,
        live_storages=frozenset(i for i, number in enumerate(fill_of) if number == _LIVE),
        scratch=tuple(scratch),
        runs=[
            tuple(Run(begin, end, tuple(fills[f].first_slot + i for f, i in places)) for begin, end, places in found)
            for found in spans
        ],
        num_slots=num_slots,
    )


_LIVE = 0
"""Number of the fill of live memory; repack ``i`` has fill ``i + 1``."""


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


def _fill_of_each(manifest: SinkRankManifest, repacks: Sequence[frozenset[int]]) -> list[int]:
    """The number of the fill that writes each storage."""
    fill_of = [_LIVE] * len(manifest.storages)
    for number, storage_idxs in enumerate(repacks, start=1):
        for idx in sorted(storage_idxs):
            if not 0 <= idx < len(fill_of):
                raise ManifestError(f"repack {number - 1} has storage {idx}, the manifest has {len(fill_of)} storages")
            if fill_of[idx] != _LIVE:
                raise ManifestError(
                    f"storage {manifest.storages[idx].name!r} belongs to repacks {fill_of[idx] - 1} and {number - 1}"
                )
            fill_of[idx] = number
    return fill_of


def _check_apart(manifest: SinkRankManifest, storages: Sequence[StorageMemory], fill_of: Sequence[int]) -> None:
    """Refuse scratch memory that lies in live memory: staging would write what the engine reads."""
    ends: dict[bool, tuple[int, str]] = {False: (0, ""), True: (0, "")}
    spans = zip(storages, manifest.storages, fill_of, strict=True)
    for memory, spec, number in sorted(spans, key=lambda s: s[0].address):
        if not spec.num_elements:
            continue
        is_live = number == _LIVE
        other_end, other = ends[not is_live]
        if memory.address < other_end:
            live, scratch = (spec.name, other) if is_live else (other, spec.name)
            raise ManifestError(f"the scratch storage {scratch!r} overlaps the live storage {live!r}")
        end = memory.address + spec.num_elements * itemsize(memory.dtype)
        ends[is_live] = max(ends[is_live], (end, spec.name))


_Span = tuple[int, int, tuple[tuple[int, int], ...]]
"""Begin and end in bytes, and for each fill that takes them its number and the bucket's place in it."""


def _add_bucket(compiler: _SinkCompiler, pos: int, fills: Sequence[Fill]) -> list[_Span]:
    """Append a bucket's descriptors to the fills that take it. Returns the spans of its runs."""
    slice_ = compiler.slice
    bucket = slice_.buckets[pos]
    rows, runs = compiler.bucket(bucket)
    for number, found in sorted(rows.items()):
        fill = fills[number]
        descs = np.array([row for row, _ in found], UNPACK_DESC)
        fill.positions.append(pos)
        fill.buckets.append(descs)
        fill.duplicates.append(_duplicates(descs, [storage for _, storage in found]))
        fill.padding_digests.append(0)
    spans: list[_Span] = []
    ends = [begin for begin, _ in runs[1:]] + [bucket.used_bytes]
    for (begin, numbers), end in zip(runs, ends, strict=True):
        padding = padding_digest(bucket, slice_.bucket_bytes, begin, end)
        for number in numbers:
            fills[number].padding_digests[-1] = (fills[number].padding_digests[-1] + padding) % 2**64
        spans.append((begin, end, tuple((n, len(fills[n].positions) - 1) for n in numbers)))
    return spans


def _duplicates(descs: DescArray, storages: Sequence[str]) -> Duplicates:
    uncounted = np.flatnonzero(descs["wire_word"] == UNCOUNTED_WORD)
    counted = np.flatnonzero(descs["wire_word"] != UNCOUNTED_WORD)
    first_idx = counted[np.searchsorted(counted, uncounted) - 1]
    made = descs[uncounted]
    made["wire_word"] = descs["wire_word"][first_idx]
    return Duplicates(made, first_idx, tuple(storages[i] for i in uncounted.tolist()))


def _part_key(part: WirePart) -> PartKey:
    return part.name.removesuffix(get_recipe(part.recipe).suffix(part.role)), part.recipe, part.group, part.role


def _with_all_dims(copy: CopySpec, num_dims: int) -> CopySpec:
    """A copy in the coordinates of its part's grid: the dimensions that the engine's scales lack have one element."""
    if len(copy.box.shape) == num_dims:
        return copy
    strides = all_dims(copy.dst_strides, num_dims, 0)
    box = box_of_all_dims(copy.box, num_dims)
    return CopySpec(copy.tensor, copy.role, box, copy.storage_idx, copy.dst_offset, strides)


_Row = tuple[object, ...]
"""Fields of an UNPACK_DESC."""

_Target = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Address, strides, extents and bytes of an element."""


class _SinkCompiler:
    def __init__(
        self,
        slice_: SinkSlice,
        manifest: SinkRankManifest,
        storages: Sequence[StorageMemory],
        fill_of: Sequence[int],
    ) -> None:
        self.slice = slice_
        self.fill_of = fill_of
        self.storages = storages
        self.storage_names = [s.name for s in manifest.storages]
        self.where = f"rank {manifest.rank} of replica {manifest.replica!r}"
        self.copies = [c for c in manifest.copies if c.box.num_elements]
        self.filled = [0] * len(self.copies)
        groups = {name: group_of(names, slice_.aliases) for names in manifest.scale_groups for name in names}
        by_key: dict[PartKey, list[int]] = {}
        for i, copy in enumerate(self.copies):
            name = slice_.aliases.get(copy.tensor, copy.tensor)
            key = (name, manifest.recipes[copy.tensor], groups.get(copy.tensor, ()), copy.role)
            by_key.setdefault(key, []).append(i)
        self.copies_of = [by_key.get(_part_key(p), []) for p in slice_.parts]
        for part, idxs in zip(slice_.parts, self.copies_of, strict=True):
            for i in idxs:
                self.copies[i] = _with_all_dims(self.copies[i], len(part.shape))

    def bucket(self, bucket: Bucket) -> tuple[dict[int, list[tuple[_Row, str]]], list[tuple[int, tuple[int, ...]]]]:
        """A bucket's descriptors by fill, each with the name of the storage that it writes, and its runs.

        A run is the byte at which it begins and the numbers of the fills that take it.
        """
        rows: dict[int, list[tuple[_Row, str]]] = {}
        runs: list[tuple[int, tuple[int, ...]]] = []
        base = bucket.bucket_idx * (self.slice.bucket_bytes // WORD_BYTES)
        for piece in bucket.pieces:
            word = base + piece.offset // WORD_BYTES
            taken: list[int] = []
            for number, (dst, strides, extents, elem_bytes), storage in self._destinations(piece):
                found = rows.setdefault(number, [])
                counted = UNCOUNTED_WORD if number in taken else word
                packed = contiguous_strides(extents)
                fields = (dst, strides, packed, extents, piece.offset, counted, elem_bytes, len(found), UNPACK_COPY, 0)
                found.append((fields, storage))
                taken.append(number)
            numbers = tuple(sorted(set(taken)))
            if not runs or runs[-1][1] != numbers:
                runs.append((piece.offset if runs else 0, numbers))
        return rows, runs

    def _destinations(self, piece: Piece) -> list[tuple[int, _Target, str]]:
        """Where a piece goes: the number of the fill, the place, and the name of the storage."""
        part = self.slice.parts[piece.part_idx]
        elem_bytes = itemsize(part.dtype)
        found: list[tuple[int, _Target, str]] = []
        for i in self.copies_of[piece.part_idx]:
            copy = self.copies[i]
            if not copy.box.contains(piece.box):
                continue
            self.filled[i] += piece.box.num_elements
            strides, extents = descriptor_dims(copy.dst_strides, piece.box.shape, part.name)
            target = (self._address(copy, piece, elem_bytes), strides, extents, elem_bytes)
            found.append((self.fill_of[copy.storage_idx], target, self.storage_names[copy.storage_idx]))
        if not found:
            raise ManifestError(
                f"{self.where} receives {piece.box} of {part.name!r}, but none of its {len(self.copies)} copies "
                f"takes it"
            )
        return found

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
