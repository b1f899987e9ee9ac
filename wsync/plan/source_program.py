"""Compile a trainer rank's slice to descriptors that are bound to its memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wsync.errors import DtypeMismatchError, ManifestError
from wsync.plan.descriptors import (
    AMAX_DESC,
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_SCALED,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    SRC_F16,
    SRC_F32,
    SRC_F32_EXACT,
    SRC_F64,
    descriptor_dims,
)
from wsync.plan.geometry import touched_cells
from wsync.plan.padding import WORD_BYTES, padding_digest, padding_ranges
from wsync.plan.types import MODE_SCALED, AmaxRegion, Bucket, Piece, SourceSlice, WirePart
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import PARAMETER, TensorSpec
from wsync.spec.recipes import get_recipe, scale_grid

F32Array = npt.NDArray[np.float32]
DescArray = npt.NDArray[np.void]
Allocate = Callable[[int], F32Array]
"""Makes a contiguous f32 array of that many elements at a fixed address."""

_FUSED_OP = {"fp8_block128": OP_FP8_BLOCK128, "fp8_block128_f32": OP_FP8_BLOCK128_F32}
_SRC_DTYPE = {"bfloat16": SRC_BF16, "float32": SRC_F32}
_CHECKED_COPY = {"bfloat16": SRC_BF16, "float16": SRC_F16, "float32": SRC_F32_EXACT, "float64": SRC_F64}
"""What a copied parameter of that dtype is declared as, so that its values must be finite. Buffers may hold anything
(masks are infinite by design), and 8-bit floats are taken as bytes."""
_F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ShardMemory:
    """Where one box of a tensor lies.

    Attributes:
        address: of the box's first element.
        strides: in elements, one for each dimension.
        box: in the tensor's coordinates.
    """

    address: int
    strides: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """The part of a tensor's scale grid that one rank writes.

    Attributes:
        first: element of the program's scales where the table begins.
        box: of scale cells; the table is row major over it.
    """

    first: int
    box: Box

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        return contiguous_strides(self.box.shape)

    def element_of(self, cell: Sequence[int]) -> int:
        """Element of the program's scales that holds the scale of ``cell``."""
        return self.first + sum((c - o) * s for c, o, s in zip(cell, self.box.offset, self.strides, strict=True))


@dataclass(slots=True)
class SourceProgram:
    """What a trainer rank replays at each publish. Holds no reference to the trainer's memory.

    Attributes:
        slice_: that was compiled.
        buckets: for each bucket position a contiguous array of PACK_DESC.
        padding: for each bucket position the byte ranges that no piece occupies.
        padding_digests: what they add to the bucket's digest.
        amax_descs: AMAX_DESC of all cut scale blocks; empty if this rank holds none of them.
        amax_vector: f32, exchanged between the ranks; of length 0 if no rank exchanges.
        scales: f32, every scale table of this rank; NaN until written.
        tables: scale table of (tensor index, recipe).
    """

    slice_: SourceSlice
    buckets: list[DescArray]
    padding: list[list[tuple[int, int]]]
    padding_digests: list[int]
    amax_descs: DescArray
    amax_vector: F32Array
    scales: F32Array
    tables: dict[tuple[int, str], ScaleTable]
    _amax_boxes: list[tuple[int, Box]] = field(repr=False)

    def locate(self, bucket_pos: int, desc_idx: int, element: int) -> tuple[str, tuple[int, ...]]:
        """Name and global index of the ``element``-th value, in packed order, of a descriptor's box.

        Args:
            bucket_pos: position of the bucket in the slice.
            desc_idx: of the descriptor in the bucket, which is also its ``piece_idx``.
            element: within the descriptor's own box.
        """
        offset = int(self.buckets[bucket_pos][desc_idx]["dst_offset"])
        piece = [p for p in self.slice_.buckets[bucket_pos].pieces if p.offset <= offset][-1]
        part = self.slice_.parts[piece.part_idx]
        element += (offset - piece.offset) // itemsize(part.dtype)
        return part.name, _index(piece.box, element)

    def locate_amax(self, desc_idx: int, element: int) -> tuple[str, tuple[int, ...]]:
        """Name and global index of the ``element``-th value, in row-major order, of an amax descriptor's box."""
        part_idx, box = self._amax_boxes[desc_idx]
        return self.slice_.parts[part_idx].name, _index(box, element)


def _index(box: Box, element: int) -> tuple[int, ...]:
    out = []
    for offset, extent, step in zip(box.offset, box.shape, contiguous_strides(box.shape), strict=True):
        out.append(offset + element // step % extent)
    return tuple(out)


def compile_source(
    slice_: SourceSlice,
    tensors: tuple[TensorSpec, ...],
    memory: Sequence[Sequence[ShardMemory]],
    *,
    allocate: Allocate | None = None,
) -> SourceProgram:
    """Bind a slice to addresses.

    Args:
        slice_: of this rank.
        tensors: the source's tensors, as in its manifest.
        memory: for each tensor where this rank's boxes lie, in the order of its manifest.
        allocate: makes the scale tables and the exchanged vector; None for host memory.

    Raises:
        ManifestError: memory that does not hold what the slice says.
        DtypeMismatchError: a dtype that the recipe cannot read.
    """
    if len(memory) != len(tensors):
        raise ManifestError(f"memory is given for {len(memory)} tensors, the source has {len(tensors)}")
    return _SourceCompiler(slice_, tensors, memory, allocate or _host_memory).program()


def _host_memory(num_elements: int) -> F32Array:
    return np.empty(num_elements, np.float32)


class _SourceCompiler:
    def __init__(
        self,
        slice_: SourceSlice,
        tensors: tuple[TensorSpec, ...],
        memory: Sequence[Sequence[ShardMemory]],
        allocate: Allocate,
    ) -> None:
        self.slice = slice_
        self.tensors = tensors
        self.memory = memory
        self.tables = _lay_out_tables(slice_)
        self.scales = allocate(sum(t.box.num_elements for t in self.tables.values()))
        self.scales.fill(np.nan)
        self.amax_vector = allocate(slice_.amax_elements)
        self.amax_vector.fill(0)

    def program(self) -> SourceProgram:
        rows, boxes = [], []
        for region in self.slice.amax_regions:
            for row, box in self._amax(region):
                rows.append(row)
                boxes.append((region.part_idx, box))
        return SourceProgram(
            slice_=self.slice,
            buckets=[self._bucket(b) for b in self.slice.buckets],
            padding=[padding_ranges(b) for b in self.slice.buckets],
            padding_digests=[padding_digest(b, self.slice.bucket_bytes) for b in self.slice.buckets],
            amax_descs=np.array(rows, AMAX_DESC),
            amax_vector=self.amax_vector,
            scales=self.scales,
            tables=self.tables,
            _amax_boxes=boxes,
        )

    def _bucket(self, bucket: Bucket) -> DescArray:
        base = bucket.bucket_idx * (self.slice.bucket_bytes // WORD_BYTES)
        rows: list[tuple[object, ...]] = []
        for piece in bucket.pieces:
            part = self.slice.parts[piece.part_idx]
            if part.role == "scale":
                rows.append(self._scale(piece, part, base))
            elif get_recipe(part.recipe).quantised:
                rows += self._quantised(piece, part, base)
            else:
                rows.append(self._plain(piece, part, base))
        return np.array([(*row, i) for i, row in enumerate(rows)], PACK_DESC)

    def _shard(self, part: WirePart, shard_idx: int, box: Box) -> ShardMemory:
        shards = self.memory[part.tensor_idx]
        if shard_idx >= len(shards) or not shards[shard_idx].box.contains(box):
            got = [s.box for s in shards]
            raise ManifestError(
                f"trainer rank {self.slice.rank} has memory for {got} of {part.name!r}, its slice reads {box} in box "
                f"{shard_idx}"
            )
        return shards[shard_idx]

    def _source_dtype(self, part: WirePart) -> tuple[int, int]:
        tensor = self.tensors[part.tensor_idx]
        dtype = tensor.dtype
        if part.recipe == "raw":
            checked = _CHECKED_COPY.get(dtype, SRC_BYTES)
            return checked if tensor.kind == PARAMETER else SRC_BYTES, itemsize(dtype)
        if dtype not in _SRC_DTYPE:
            raise DtypeMismatchError(f"{part.name!r} is {dtype}, recipe {part.recipe!r} reads {', '.join(_SRC_DTYPE)}")
        return _SRC_DTYPE[dtype], itemsize(dtype)

    def _plain(self, piece: Piece, part: WirePart, base: int) -> tuple[object, ...]:
        shard = self._shard(part, piece.shard_idx, piece.box)
        src_dtype, elem_bytes = self._source_dtype(part)
        op = OP_COPY if part.recipe == "raw" else OP_BF16
        src = _address_in(shard, piece.box.offset, elem_bytes)
        strides, extents = descriptor_dims(shard.strides, piece.box.shape, part.name)
        word = base + piece.offset // WORD_BYTES
        return (src, strides, extents, piece.offset, word, 0, 0, 0, 0, 0, op, src_dtype, elem_bytes)

    def _scale(self, piece: Piece, part: WirePart, base: int) -> tuple[object, ...]:
        table = self.tables[(part.tensor_idx, part.recipe)]
        src = self._scale_address(table, piece.box.offset)
        strides, extents = descriptor_dims(table.strides, piece.box.shape, part.name)
        word = base + piece.offset // WORD_BYTES
        return (src, strides, extents, piece.offset, word, 0, 0, 0, 0, 0, OP_COPY, SRC_BYTES, _F32_BYTES)

    def _scale_address(self, table: ScaleTable, cell: Sequence[int]) -> int:
        return int(self.scales.ctypes.data) + _F32_BYTES * table.element_of(cell)

    def _quantised(self, piece: Piece, part: WirePart, base: int) -> Iterator[tuple[object, ...]]:
        """One descriptor for each matrix of the piece."""
        shard = self._shard(part, piece.shard_idx, piece.box)
        src_dtype, elem_bytes = self._source_dtype(part)
        table = self.tables[(part.tensor_idx, part.recipe)]
        op = OP_FP8_SCALED if piece.mode == MODE_SCALED else _FUSED_OP[part.recipe]
        offset = piece.offset
        for matrix in _matrices(piece.box):
            cells, phases = self._cells(matrix, part.recipe)
            src = _address_in(shard, matrix.offset, elem_bytes)
            strides = (0, 0, *shard.strides[-2:])
            extents = (1, 1, *matrix.shape[-2:])
            scales = self._scale_address(table, cells)
            word = base + offset // WORD_BYTES
            row = (src, strides, extents, offset, word, scales, table.strides[-2], 0, *phases)
            yield (*row, op, src_dtype, elem_bytes)
            offset += matrix.num_elements * itemsize(part.dtype)

    def _amax(self, region: AmaxRegion) -> Iterator[tuple[tuple[object, ...], Box]]:
        part = self.slice.parts[region.part_idx]
        shard = self._shard(part, region.shard_idx, region.box)
        src_dtype, elem_bytes = self._source_dtype(part)
        table = self.tables[(part.tensor_idx, part.recipe)]
        grid_strides = contiguous_strides(scale_grid(part.shape, get_recipe(part.recipe).block))
        for matrix in _matrices(region.box):
            cells, phases = self._cells(matrix, part.recipe)
            element = region.grid_offset + sum(c * s for c, s in zip(cells, grid_strides, strict=True))
            row = (
                _address_in(shard, matrix.offset, elem_bytes),
                shard.strides[-2:],
                matrix.shape[-2:],
                int(self.amax_vector.ctypes.data) + _F32_BYTES * element,
                grid_strides[-2],
                self._scale_address(table, cells),
                table.strides[-2],
                *phases,
                src_dtype,
                _FUSED_OP[part.recipe],
            )
            yield row, matrix

    @staticmethod
    def _cells(matrix: Box, recipe: str) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The first scale cell of a matrix and where in its block the matrix begins."""
        rows, cols = get_recipe(recipe).block
        row, col = matrix.offset[-2:]
        return (*matrix.offset[:-2], row // rows, col // cols), (row % rows, col % cols)


def _address_in(shard: ShardMemory, index: Sequence[int], elem_bytes: int) -> int:
    """Address of the element at a global index."""
    steps = zip(index, shard.box.offset, shard.strides, strict=True)
    return shard.address + elem_bytes * sum((i - o) * s for i, o, s in steps)


def _matrices(box: Box) -> Iterator[Box]:
    """The matrices of a box of two or more dimensions, in order."""
    outer = [range(o, o + n) for o, n in zip(box.offset[:-2], box.shape[:-2], strict=True)]
    for index in itertools.product(*outer):
        yield Box((*index, *box.offset[-2:]), ((1,) * len(index)) + box.shape[-2:])


def _lay_out_tables(slice_: SourceSlice) -> dict[tuple[int, str], ScaleTable]:
    """A table for each tensor and recipe, just as large as what this rank writes or sends."""
    bounds: dict[tuple[int, str], Box] = {}
    used = [(p.part_idx, p.box) for b in slice_.buckets for p in b.pieces]
    used += [(r.part_idx, r.box) for r in slice_.amax_regions]
    for part_idx, box in used:
        part = slice_.parts[part_idx]
        recipe = get_recipe(part.recipe)
        if not recipe.quantised:
            continue
        cells = box if part.role == "scale" else touched_cells(box, recipe.block)
        key = (part.tensor_idx, part.recipe)
        bounds[key] = _around(bounds[key], cells) if key in bounds else cells
    tables, first = {}, 0
    for key, box in bounds.items():
        tables[key] = ScaleTable(first, box)
        first += math.prod(box.shape)
    return tables


def _around(a: Box, b: Box) -> Box:
    """The smallest box with both inside."""
    offset = tuple(map(min, a.offset, b.offset))
    end = tuple(map(max, a.end, b.end))
    return Box(offset, tuple(e - o for o, e in zip(offset, end, strict=True)))
