"""Layouts: where engines keep the elements of a part in memory, as strided copies that descriptors can execute.

A part travels plain: row major, in a checkpoint's order of rows. Some engines keep it otherwise: experts' halves
swapped, rows interleaved or shuffled, columns in blocks, scales swizzled, padded or packed. All of these move an
element by its row and by its column independently: a layout says, for each axis, which index of the plain part is
where. Compositions are compositions of these vectors: a row map can stand before any layout.

Source: the index formulas of cuBLAS (128x4 scale factors), FlashInfer (``shuffle_matrix_a``,
``reorder_rows_for_gated_act_gemm``, BlockMajorK) and DeepGEMM (packed E8M0 scales, aligned for TMA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.errors import ManifestError
from wsync.plan.descriptors import UNPACK_COPY, UNPACK_EXPONENT, UNPACK_FILL
from wsync.plan.strided import Piece, StridedCopy, product_copies, strided_pieces
from wsync.spec.box import Box, contiguous_strides

RowMap = npt.NDArray[np.int64]
"""For each row of a layout the row of the plain part that it holds, or `NO_SOURCE` for padding."""

NO_SOURCE = -1

SHUFFLE_BLOCKS: dict[int, tuple[int, int]] = {64: (8, 2), 128: (8, 4)}
"""Rows of an epilogue tile -> ``a`` and ``b`` of the shuffle ``(n a b) -> (n b a)``."""


def identity_rows(num_rows: int) -> RowMap:
    """Every row at its own place."""
    return np.arange(num_rows, dtype=np.int64)


def swapped_halves(num_rows: int) -> RowMap:
    """``[w1; w3] -> [w3; w1]``.

    Raises:
        ManifestError: an odd number of rows.
    """
    _check_multiple("rows", num_rows, 2, "two halves")
    return np.roll(identity_rows(num_rows), num_rows // 2)


def interleaved_halves(num_rows: int) -> RowMap:
    """``(two n) -> (n two)``: a row of the first half, then its counterpart of the second.

    Raises:
        ManifestError: an odd number of rows.

    Source: FlashInfer ``get_reorder_rows_for_gated_act_gemm_row_indices``.
    """
    _check_multiple("rows", num_rows, 2, "two halves")
    return identity_rows(num_rows).reshape(2, -1).T.reshape(-1)


def shuffled_rows(num_rows: int, tile: int) -> RowMap:
    """``(n a b) -> (n b a)`` with the ``a`` and ``b`` of `SHUFFLE_BLOCKS`: the order in which the tile's threads read.

    Raises:
        ManifestError: another tile, or rows that are not a multiple of ``a * b``.

    Source: FlashInfer ``get_shuffle_matrix_a_row_indices``.
    """
    if tile not in SHUFFLE_BLOCKS:
        raise ManifestError(f"rows are shuffled for tiles of {sorted(SHUFFLE_BLOCKS)} rows, but the tile is {tile}")
    a, b = SHUFFLE_BLOCKS[tile]
    _check_multiple("rows", num_rows, a * b, f"the shuffle for tiles of {tile}")
    return identity_rows(num_rows).reshape(-1, a, b).transpose(0, 2, 1).reshape(-1)


def padded_rows(num_rows: int, num_padded: int, num_segments: int = 1) -> RowMap:
    """``num_segments`` equal segments, each padded at its end, for ``num_padded`` rows in all.

    Raises:
        ManifestError: the segments do not divide the rows, or the padded rows are fewer.
    """
    _check_multiple("rows", num_rows, num_segments, f"{num_segments} segments")
    _check_multiple("padded rows", num_padded, num_segments, f"{num_segments} segments")
    if num_padded < num_rows:
        raise ManifestError(f"{num_rows} rows do not fit the {num_padded} padded ones")
    out = np.full((num_segments, num_padded // num_segments), NO_SOURCE, np.int64)
    out[:, : num_rows // num_segments] = identity_rows(num_rows).reshape(num_segments, -1)
    return out.reshape(-1)


def composed(*maps: RowMap) -> RowMap:
    """One map after the other, the first one applied first; padding stays padding.

    Raises:
        ManifestError: a map takes a row that the one before it does not have.
    """
    out = maps[0]
    for rows in maps[1:]:
        if len(rows) and int(rows.max()) >= len(out):
            raise ManifestError(f"a row map takes row {int(rows.max())}, but the one before it has {len(out)} rows")
        out = np.where(rows == NO_SOURCE, NO_SOURCE, out[np.maximum(rows, 0)] if len(out) else NO_SOURCE)
    return out


class Axis(NamedTuple):
    """One axis of a layout: equally long vectors.

    Attributes:
        source: index in the plain part's dimension, or `NO_SOURCE` for padding.
        place: what an element at this position adds to its offset in the layout, in elements.
    """

    source: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]


class Layout(NamedTuple):
    """Where each element of a part lies in engine memory.

    Attributes:
        shape: of the plain part, ``[..., M, K]``.
        axes: one for each dimension.
        num_elements: of the memory, padding included.
        op: `UNPACK_COPY`, or `UNPACK_EXPONENT` where f32 powers of two become bytes.
        fill: value of padding, as an unsigned integer.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    num_elements: int
    op: int = UNPACK_COPY
    fill: int = 0

    def copies(self, box: Box | None = None, src_strides: Sequence[int] | None = None) -> tuple[StridedCopy, ...]:
        """What puts a box of the plain part at its places: the whole part, or what one copy of it carries.

        Args:
            box: in the plain part's coordinates.
            src_strides: of the box in its source, in elements; row major by default.

        Raises:
            ManifestError: the box is not inside the part.
        """
        box = box or Box.whole(self.shape)
        if len(box.shape) != len(self.shape) or not Box.whole(self.shape).contains(box):
            raise ManifestError(f"a box at {box.offset} of shape {box.shape} is not inside a part of {self.shape}")
        strides = contiguous_strides(box.shape) if src_strides is None else src_strides
        parts = zip(self.axes, box.offset, box.end, strides, strict=True)
        return tuple(product_copies(self.op, [_held(axis, *cut) for axis, *cut in parts]))

    def fills(self) -> tuple[StridedCopy, ...]:
        """What writes the padding, each of its elements once."""
        out: list[StridedCopy] = []
        for i in range(len(self.axes)):
            held = [axis.source != NO_SOURCE for axis in self.axes[:i]]
            keep = [*held, self.axes[i].source == NO_SOURCE]
            keep += [np.ones(len(axis.source), np.bool_) for axis in self.axes[i + 1 :]]
            places = [axis.place[mask] for axis, mask in zip(self.axes, keep, strict=True)]
            if all(map(len, places)):
                pieces = [strided_pieces(np.zeros_like(p), np.sort(p)) for p in places]
                out += product_copies(UNPACK_FILL, pieces, fill=self.fill)
        return tuple(out)


def _held(axis: Axis, begin: int, end: int, src_stride: int) -> list[Piece]:
    """The pieces of an axis whose source is in an interval, in the order of the memory."""
    mask = (axis.source >= begin) & (axis.source < end)
    source, place = axis.source[mask], axis.place[mask]
    order = np.argsort(place, kind="stable")
    return strided_pieces((source[order] - begin) * src_stride, place[order])


def row_major(shape: tuple[int, ...], rows: RowMap | None = None, num_cols: int | None = None, fill: int = 0) -> Layout:
    """``[..., M', K']``: rows by a map, columns padded to ``num_cols``.

    Raises:
        ManifestError: the map is not one of this shape, or there are fewer columns than the part has.
    """
    row = _rows(shape, rows)
    col = _padded(shape[-1], shape[-1] if num_cols is None else num_cols)
    places = [np.arange(len(row)) * len(col), np.arange(len(col))]
    return _layout(shape, [row, col], places, len(row) * len(col), fill=fill)


def block_major_k(shape: tuple[int, ...], rows: RowMap | None = None, block: int = 128) -> Layout:
    """``[..., K / block, M', block]``: blocks of columns outermost (BlockMajorK).

    Args:
        shape: of the part; of bf16 that is moved as bytes, ``K`` counts bytes.
        rows: map of the rows.
        block: columns of one block; FlashInfer has 128 bytes.

    Raises:
        ManifestError: ``K`` is not a multiple of the block, or the map is not one of this shape.
    """
    _check_multiple("columns", shape[-1], block, f"blocks of {block}")
    row, col = _rows(shape, rows), np.arange(shape[-1], dtype=np.int64)
    places = [np.arange(len(row)) * block, col // block * (len(row) * block) + col % block]
    return _layout(shape, [row, col], places, len(row) * len(col))


def swizzled_128x4(shape: tuple[int, ...], rows: RowMap | None = None, fill: int = 0) -> Layout:
    """Scale bytes ``[..., M, G]`` in tiles of 128 rows and 4 groups, padded to whole ones.

    ``(mt q p) (gt c) -> mt gt p q c`` with ``q = 4``, ``p = 32``, ``c = 4``.

    Raises:
        ManifestError: the map is not one of this shape.

    Source: cuBLAS, 128x4 scale factor layout; torchao ``to_blocked``; vLLM ``swizzle_blockscale``.
    """
    given = _rows(shape, rows)
    row = composed(given, padded_rows(len(given), _aligned(len(given), 128)))
    col = _padded(shape[-1], _aligned(shape[-1], 4))
    m, g = np.arange(len(row)), np.arange(len(col))
    places = [m // 128 * (len(col) * 128) + m % 32 * 16 + m // 32 % 4 * 4, g // 4 * 512 + g % 4]
    return _layout(shape, [row, col], places, len(row) * len(col), fill=fill)


def packed_exponents(shape: tuple[int, ...], num_rows: int, block_rows: int = 128) -> Layout:
    """Exponent bytes of power-of-two f32 scales ``[..., ceil(N / block_rows), G]``, repeated for each of ``N`` rows.

    Four groups share an int32 (little endian), which lies column major: byte ``4 * (g / 4 * align(N, 4) + n) + g % 4``;
    what is padded is zero.

    Raises:
        ManifestError: the scales are not those of ``num_rows`` rows.

    Source: DeepGEMM ``get_mn_major_tma_aligned_packed_ue8m0_tensor``; SGLang ``transform_scale_ue8m0``.
    """
    if shape[-2] != -(-num_rows // block_rows):
        raise ManifestError(
            f"{num_rows} rows in blocks of {block_rows} have {-(-num_rows // block_rows)} rows of scales, but the "
            f"scales have shape {shape}"
        )
    aligned = _aligned(num_rows, 4)
    row = padded_rows(num_rows, aligned)
    row = np.where(row == NO_SOURCE, NO_SOURCE, row // block_rows)
    col = _padded(shape[-1], _aligned(shape[-1], 4))
    g = np.arange(len(col))
    places = [np.arange(aligned) * 4, g // 4 * (aligned * 4) + g % 4]
    return _layout(shape, [row, col], places, aligned * len(col), op=UNPACK_EXPONENT)


def _layout(
    shape: tuple[int, ...],
    indices: Sequence[npt.NDArray[np.int64]],
    places: Sequence[npt.NDArray[np.int64]],
    matrix_elements: int,
    op: int = UNPACK_COPY,
    fill: int = 0,
) -> Layout:
    """A layout of the matrices, which follow each other."""
    batch = shape[:-2]
    strides = contiguous_strides(batch)
    axes = [Axis(np.arange(n), np.arange(n) * (s * matrix_elements)) for n, s in zip(batch, strides, strict=True)]
    axes += [Axis(i, p.astype(np.int64)) for i, p in zip(indices, places, strict=True)]
    return Layout(shape, tuple(axes), math.prod(batch) * matrix_elements, op, fill)


def _rows(shape: tuple[int, ...], rows: RowMap | None) -> RowMap:
    if len(shape) < 2:
        raise ManifestError(f"a layout moves matrices of 2 or more dimensions, but the part has shape {shape}")
    if rows is None:
        return identity_rows(shape[-2])
    if len(rows) and not NO_SOURCE <= int(rows.min()) <= int(rows.max()) < shape[-2]:
        raise ManifestError(
            f"a row map takes rows from {int(rows.min())} to {int(rows.max())}, but the part has shape {shape}"
        )
    return rows


def _padded(num: int, num_padded: int) -> npt.NDArray[np.int64]:
    if num_padded < num:
        raise ManifestError(f"{num} columns do not fit the {num_padded} padded ones")
    return padded_rows(num, num_padded)


def _aligned(num: int, to: int) -> int:
    return -(-num // to) * to


def _check_multiple(what: str, num: int, of: int, why: str) -> None:
    if num % of:
        raise ManifestError(f"{why} need a multiple of {of} {what}, but there are {num}")
