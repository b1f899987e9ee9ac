"""Compile a trainer rank's slice to descriptors that are bound to its memory."""

from __future__ import annotations

import itertools
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
    OP_FP8_CHANNEL,
    OP_FP8_CHANNEL_SCALED,
    OP_FP8_SCALED,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    SRC_F16,
    SRC_F32,
    SRC_F32_EXACT,
    SRC_F64,
    descriptor_dims,
)
from wsync.plan.grids import Grid, Grids, grids_of, to_weights
from wsync.plan.padding import WORD_BYTES, padding_digest, padding_ranges
from wsync.plan.tables import ScaleTable, TableKey, lay_out_tables
from wsync.plan.types import MODE_SCALED, AmaxRegion, Bucket, Piece, SourceSlice, WirePart
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import PARAMETER, TensorSpec
from wsync.spec.recipes import SCALE_BLOCK, Recipe, get_recipe

F32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
DescArray = npt.NDArray[np.void]
Allocate = Callable[[int], Bytes]
"""Makes a contiguous array of that many bytes at a fixed address that is a multiple of 4."""

RECIPE_OPS = {
    "fp8_block128": OP_FP8_BLOCK128,
    "fp8_block128_f32": OP_FP8_BLOCK128_F32,
    "fp8_channel": OP_FP8_CHANNEL,
    "fp8_tensor": OP_FP8_TENSOR,
    "mxfp8": OP_MXFP8,
    "nvfp4": OP_NVFP4,
}
"""What packs boxes with whole scale blocks, and the rule by which amaxes become scales."""
_SCALED_OPS = {
    "fp8_block128": OP_FP8_SCALED,
    "fp8_block128_f32": OP_FP8_SCALED,
    "fp8_channel": OP_FP8_CHANNEL_SCALED,
    "fp8_tensor": OP_FP8_TENSOR,
}
"""What packs boxes whose scales are there already."""
_SRC_DTYPE = {"bfloat16": SRC_BF16, "float32": SRC_F32, "float16": SRC_F16}
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


@dataclass(slots=True)
class SourceProgram:
    """What a trainer rank replays at each publish. Holds no reference to the trainer's memory.

    Attributes:
        slice_: that was compiled.
        buckets: for each bucket position a contiguous array of PACK_DESC.
        padding: for each bucket position the byte ranges that no piece occupies.
        padding_digests: what they add to the bucket's digest.
        amax_descs: AMAX_DESC of all boxes whose amaxes are exchanged; empty if this rank holds none of them.
        amax_vector: f32, exchanged between the ranks; of length 0 if no rank exchanges.
        scales: the bytes of every scale table of this rank; all ones (NaN in each of their dtypes) until written.
        tables: where each table lies in them.
    """

    slice_: SourceSlice
    buckets: list[DescArray]
    padding: list[list[tuple[int, int]]]
    padding_digests: list[int]
    amax_descs: DescArray
    amax_vector: F32Array
    scales: Bytes
    tables: dict[TableKey, ScaleTable]
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
        recipe = get_recipe(part.recipe)
        element += (offset - piece.offset) // itemsize(part.dtype) * recipe.packed
        return part.name, _index(to_weights(piece.box, recipe.packed), element)

    def locate_amax(self, desc_idx: int, element: int) -> tuple[str, tuple[int, ...]]:
        """Name and global index of the ``element``-th value, in row-major order, of an amax descriptor's box."""
        part_idx, box = self._amax_boxes[desc_idx]
        return self.slice_.parts[part_idx].name, _index(box, element)

    def name_of_amax(self, element: int) -> str:
        """Name of a tensor of this rank that has the amax at that element of the exchanged vector."""
        regions = self.slice_.amax_regions
        region = max((r for r in regions if r.grid_offset <= element), key=lambda r: r.grid_offset, default=regions[0])
        return self.slice_.parts[region.part_idx].name


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


def _host_memory(num_bytes: int) -> Bytes:
    return np.empty(-(-num_bytes // 8), np.uint64).view(np.uint8)[:num_bytes]


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
        self.grids = [self._grids(p) for p in slice_.parts]
        self.tables, num_bytes = lay_out_tables(slice_, self.grids)
        self.scales = allocate(num_bytes)
        self.scales.fill(0xFF)
        self.amax_vector = allocate(_F32_BYTES * slice_.amax_elements).view(np.float32)
        self.amax_vector.fill(0)
        self.grid_offset = {r.part_idx: r.grid_offset for r in slice_.amax_regions}

    def _grids(self, part: WirePart) -> Grids | None:
        recipe = get_recipe(part.recipe)
        return grids_of(recipe, self.tensors[part.tensor_idx].shape) if recipe.quantised else None

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
            grids = self.grids[piece.part_idx]
            if part.role != "weight":
                rows.append(self._scale(piece, part, base))
            elif grids is not None:
                rows += self._quantised(piece, part, grids, base)
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
        table = self.tables[TableKey.of(part, part.role)]
        src = self._scale_address(table, piece.box.offset)
        strides, extents = descriptor_dims(table.strides, piece.box.shape, part.name)
        word = base + piece.offset // WORD_BYTES
        return (src, strides, extents, piece.offset, word, 0, 0, 0, 0, 0, OP_COPY, SRC_BYTES, table.elem_bytes)

    def _scale_address(self, table: ScaleTable, cell: Sequence[int]) -> int:
        return int(self.scales.ctypes.data) + table.byte_of(cell)

    def _amax_address(self, part_idx: int, grid: Grid, cell: Sequence[int]) -> int:
        """Where the exchanged vector has the amax of a cell."""
        element = sum(c * s for c, s in zip(cell, contiguous_strides(grid.shape), strict=True))
        return int(self.amax_vector.ctypes.data) + _F32_BYTES * (self.grid_offset[part_idx] + element)

    def _quantised(self, piece: Piece, part: WirePart, grids: Grids, base: int) -> Iterator[tuple[object, ...]]:
        """One descriptor for each matrix of the piece."""
        recipe = get_recipe(part.recipe)
        shard = self._shard(part, piece.shard_idx, to_weights(piece.box, recipe.packed))
        src_dtype, elem_bytes = self._source_dtype(part)
        op = (_SCALED_OPS if piece.mode == MODE_SCALED else RECIPE_OPS).get(part.recipe)
        if op is None or (grids.always and piece.part_idx not in self.grid_offset):
            raise ManifestError(f"the slice packs {part.name!r} without the amaxes that recipe {part.recipe!r} needs")
        offset = piece.offset
        for matrix in _matrices(piece.box):
            weights = to_weights(matrix, recipe.packed)
            src = _address_in(shard, weights.offset, elem_bytes)
            strides = (0, 0, *shard.strides[-2:])
            extents = (1, 1, *weights.shape[-2:])
            word = base + offset // WORD_BYTES
            scales = self._scales_of(part, grids, matrix)
            amax = 0
            if grids.always and grids.shared is not None:
                amax = self._amax_address(piece.part_idx, grids.shared, _first_cell(matrix, grids.shared))
            phases = _phases(matrix, recipe)
            yield (src, strides, extents, offset, word, *scales, amax, *phases, op, src_dtype, elem_bytes)
            offset += matrix.num_elements * itemsize(part.dtype)

    def _scales_of(self, part: WirePart, grids: Grids, matrix: Box) -> tuple[int, int]:
        """Where the packing operation makes or reads the scales of a matrix, and their row stride."""
        if grids.packed is None:
            return 0, 0
        table = self.tables[TableKey.of(part, grids.packed.role)]
        return self._scale_address(table, _first_cell(matrix, grids.packed)), table.strides[-2]

    def _amax(self, region: AmaxRegion) -> Iterator[tuple[tuple[object, ...], Box]]:
        part = self.slice.parts[region.part_idx]
        grids = self.grids[region.part_idx]
        grid = grids.shared if grids is not None else None
        if grid is None:
            raise ManifestError(f"the slice exchanges amaxes of {part.name!r}, but recipe {part.recipe!r} has none")
        recipe = get_recipe(part.recipe)
        shard = self._shard(part, region.shard_idx, to_weights(region.box, recipe.packed))
        src_dtype, elem_bytes = self._source_dtype(part)
        table = self.tables[TableKey.of(part, grid.role)]
        for matrix in _matrices(region.box):
            weights = to_weights(matrix, recipe.packed)
            cell = _first_cell(matrix, grid)
            row = (
                _address_in(shard, weights.offset, elem_bytes),
                shard.strides[-2:],
                weights.shape[-2:],
                self._amax_address(region.part_idx, grid, cell),
                contiguous_strides(grid.shape)[-2],
                self._scale_address(table, cell),
                table.strides[-2],
                *_phases(matrix, recipe),
                src_dtype,
                RECIPE_OPS[part.recipe],
            )
            yield row, weights


def _first_cell(matrix: Box, grid: Grid) -> tuple[int, ...]:
    """The scale cell of a matrix's first element."""
    rows, cols = grid.cell
    row, col = matrix.offset[-2:]
    return (*matrix.offset[:-2], row // rows, col // cols)


def _phases(matrix: Box, recipe: Recipe) -> tuple[int, int]:
    """Where in its scale block a matrix begins; 0 where blocks are whole rows, groups or matrices."""
    if recipe.block != (SCALE_BLOCK, SCALE_BLOCK):
        return 0, 0
    row, col = matrix.offset[-2:]
    return row % SCALE_BLOCK, col % SCALE_BLOCK


def _address_in(shard: ShardMemory, index: Sequence[int], elem_bytes: int) -> int:
    """Address of the element at a global index."""
    steps = zip(index, shard.box.offset, shard.strides, strict=True)
    return shard.address + elem_bytes * sum((i - o) * s for i, o, s in steps)


def _matrices(box: Box) -> Iterator[Box]:
    """The matrices of a box of two or more dimensions, in order."""
    outer = [range(o, o + n) for o, n in zip(box.offset[:-2], box.shape[:-2], strict=True)]
    for index in itertools.product(*outer):
        yield Box((*index, *box.offset[-2:]), ((1,) * len(index)) + box.shape[-2:])
