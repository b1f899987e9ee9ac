"""From descriptors to launches: which kernel serves each box, and the units of its programs.

A launch is a kernel with its compile-time arguments and the units of all boxes that it serves; a tensor adds units, not
launches.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from wsync.kernels.triton import configs
from wsync.kernels.triton.checks import Descs
from wsync.plan import descriptors as d

Units = npt.NDArray[np.int32]
"""``[n, 3]``: descriptor, tile row, tile column."""

_FP8_BLOCKS = (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32, d.OP_FP8_SCALED)
_LOOP_OPS = (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32)


class Launches:
    """Units gathered by kernel: the keys are a kernel's name and its compile-time arguments."""

    def __init__(self) -> None:
        self._units: dict[tuple[Hashable, ...], list[Units]] = {}

    def add(self, key: tuple[Hashable, ...], units: Units) -> None:
        """Adds ``units`` to the launch ``key``."""
        if len(units):
            self._units.setdefault(key, []).append(units)

    def items(self) -> Iterator[tuple[tuple[Any, ...], Units]]:
        """Keys and units, in the order in which the keys were first added."""
        for key, units in self._units.items():
            yield key, np.concatenate(units)


def grid(desc_idx: int, rows: int, cols: int) -> Units:
    """Units of ``rows x cols`` tiles."""
    units = np.empty((rows * cols, 3), np.int32)
    units[:, 0] = desc_idx
    units[:, 1] = np.repeat(np.arange(rows), cols)
    units[:, 2] = np.tile(np.arange(cols), rows)
    return units


def tiles(n: int, size: int) -> int:
    """Tiles of ``size`` that hold ``n``."""
    return -(-n // size)


def merged(strides: npt.NDArray[np.int64], extents: npt.NDArray[np.int64]) -> None:
    """Joins, in place, neighbouring dimensions that lie contiguously in every row of ``strides`` (``[k, 4]``)."""
    kept: list[tuple[list[int], int]] = []
    for dim in range(d.NUM_DIMS - 1, -1, -1):
        extent = int(extents[dim])
        stride = [int(s) for s in strides[:, dim]]
        if extent == 1:
            continue
        if kept and all(s == inner * kept[-1][1] for s, inner in zip(stride, kept[-1][0], strict=True)):
            kept[-1] = (kept[-1][0], kept[-1][1] * extent)
        else:
            kept.append((stride, extent))
    strides[:], extents[:] = 0, 1
    strides[:, -1] = 1
    for i, (stride, extent) in enumerate(kept):
        strides[:, -1 - i], extents[-1 - i] = stride, extent


def aligned_rows(address: int, strides: Iterable[int], elem_bytes: int, row_bytes: int) -> bool:
    """Whether contiguous rows begin and end on 16 bytes."""
    return all(n % 16 == 0 for n in (address, row_bytes, *(int(s) * elem_bytes for s in strides)))


def split_full(units: Units, rows: int, cols: int, phase: tuple[int, int]) -> tuple[Units, Units]:
    """The tiles that lie wholly in a box that begins ``phase`` into its first tile, and the others."""
    first_row = units[:, 1] * configs.TILE - phase[0]
    first_col = units[:, 2] * configs.TILE - phase[1]
    inside = (first_row >= 0) & (first_row + configs.TILE <= rows)
    inside &= (first_col >= 0) & (first_col + configs.TILE <= cols)
    return units[inside], units[~inside]


def add_tiles(launches: Launches, name: str, idx: int, desc: np.void, box: tuple[int, int], op: int,
              codes_per_byte: int, wide: bool, *rest: Hashable) -> None:  # fmt: skip
    """The tiles of a matrix: whole ones to the launch with FULL, the rest to the other."""
    rows, cols = box
    phase = (int(desc["row_phase"]), int(desc["col_phase"])) if op in _FP8_BLOCKS else (0, 0)
    units = grid(idx, tiles(rows + phase[0], configs.TILE), tiles(cols + phase[1], configs.TILE))
    src = int(desc["src_dtype"])
    wide = wide and phase[1] % 16 == 0 and (cols // codes_per_byte) % 16 == 0
    full, edge = split_full(units, rows, cols, phase) if wide else (units[:0], units)
    launches.add((name, op, src, True, *rest), full)
    launches.add((name, op, src, False, *rest), edge)


def is_wide(desc: np.void, src_stride: npt.NDArray[np.int64], cols: int, dst: int) -> bool:
    """Whether a matrix has contiguous rows that are aligned at both ends."""
    # An AMAX_DESC has no elem_bytes.
    elem_bytes = 2 if int(desc["src_dtype"]) in (d.SRC_BF16, d.SRC_F16) else 4
    contiguous = int(src_stride[1]) == 1 and dst % 16 == 0
    return contiguous and aligned_rows(int(desc["src"]), src_stride[:1], elem_bytes, cols * elem_bytes)


def plan_pack(descs: Descs, dst_base: int) -> tuple[Descs, Launches, list[tuple[int, int, int]]]:
    """The records as the kernels take them, the launches, and what is left to digest: (address, bytes, wire word).

    Launches that read scales come after those that write them.
    """
    table = descs.copy()
    launches, last, ranges = Launches(), Launches(), []
    for idx, desc in enumerate(table):
        numel = int(np.prod(desc["extent"]))
        if numel == 0:
            continue
        op = int(desc["op"])
        dst = dst_base + int(desc["dst_offset"])
        if op in (d.OP_COPY, d.OP_BF16):
            counted = _plan_copy(launches, idx, desc, dst)
            nbytes = numel * (2 if op == d.OP_BF16 else int(desc["elem_bytes"]))
        else:
            counted = _plan_quantise(launches, last, idx, desc, dst)
            nbytes = numel // (2 if op == d.OP_NVFP4 else 1)
        if not counted:
            ranges.append((dst, nbytes, int(desc["wire_word"])))
    for key, units in last.items():
        launches.add(key, units)
    return table, launches, ranges


def _plan_quantise(launches: Launches, last: Launches, idx: int, desc: np.void, dst: int) -> bool:
    op, src = int(desc["op"]), int(desc["src_dtype"])
    rows, cols = (int(n) for n in desc["extent"][2:])
    packed = 2 if op == d.OP_NVFP4 else 1
    wide = is_wide(desc, desc["src_stride"][2:], cols, dst) and (cols // packed) % 16 == 0
    if op == d.OP_FP8_CHANNEL:
        if wide and cols <= configs.LONGEST_ROW:
            tile_rows, tile_cols, _ = configs.row_tile(cols)
            whole = rows // tile_rows if cols == tile_cols else 0
            units = grid(idx, tiles(rows, tile_rows), 1)
            launches.add(("quantise_rows", src, tile_rows, tile_cols, True), units[:whole])
            launches.add(("quantise_rows", src, tile_rows, tile_cols, False), units[whole:])
            return True
        launches.add(("row_scales", src), grid(idx, tiles(rows, configs.TILE), 1))
        launches, op = last, d.OP_FP8_CHANNEL_SCALED
    phase = int(desc["col_phase"]) if op in _FP8_BLOCKS else 0
    counted = (cols // packed) % 8 == 0 and phase % 8 == 0
    add_tiles(launches, "quantise_tiles", idx, desc, (rows, cols), op, packed, wide, counted, False)
    if op == d.OP_NVFP4:  # once more, for tensors of unusual scale: see the kernel
        add_tiles(launches, "quantise_tiles", idx, desc, (rows, cols), op, packed, wide, counted, True)
    return counted


def _plan_copy(launches: Launches, idx: int, desc: np.void, dst: int) -> bool:
    op, src, elem_bytes = int(desc["op"]), int(desc["src_dtype"]), int(desc["elem_bytes"])
    merged(desc["src_stride"][None, :], desc["extent"])
    *outer, cols = (int(n) for n in desc["extent"])
    rows = int(np.prod(outer))
    rounds = op == d.OP_BF16 and src != d.SRC_BF16
    row_bytes = cols * elem_bytes
    wide = int(desc["src_stride"][3]) == 1 and dst % 16 == 0 and row_bytes % (32 if rounds else 16) == 0
    wide = wide and aligned_rows(int(desc["src"]), desc["src_stride"][:3], elem_bytes, row_bytes)
    if wide and not (rounds and src == d.SRC_F16):
        words = cols // 4 if rounds else row_bytes // 8
        shape = configs.fitting(configs.WORD_TILES, words)
        name: tuple[Hashable, ...] = ("round_words",) if rounds else ("copy_words", src)
        launches.add((*name, *shape), grid(idx, tiles(rows, shape[0]), tiles(words, shape[1])))
        return True
    shape = configs.fitting(configs.ELEMENT_TILES, cols)
    units = grid(idx, tiles(rows, shape[0]), tiles(cols, shape[1]))
    launches.add(("copy_elements", op, src, elem_bytes, *shape), units)
    return False


def plan_unpack(descs: Descs, src_base: int) -> tuple[Descs, Launches, list[int], list[tuple[int, int, int]]]:
    """The records as the kernels take them, the launches, and what is left to digest: boxes and contiguous ranges."""
    table = descs.copy()
    launches, boxes, ranges = Launches(), [], []
    for idx, desc in enumerate(table):
        numel = int(np.prod(desc["extent"]))
        if numel == 0:
            continue
        op, elem_bytes = int(desc["op"]), int(desc["elem_bytes"])
        src = src_base + int(desc["src_offset"])
        counted = int(desc["wire_word"]) != (1 << 64) - 1
        if not _plan_words(launches, idx, desc, src, installed=False):
            packed = op == d.UNPACK_COPY and _is_packed(desc["src_stride"], desc["extent"])
            shape = configs.fitting(configs.ELEMENT_TILES, int(desc["extent"][3]))
            rows, cols = int(np.prod(desc["extent"][:3])), int(desc["extent"][3])
            units = grid(idx, tiles(rows, shape[0]), tiles(cols, shape[1]))
            launches.add(("unpack_elements", op, elem_bytes, *shape), units)
            if counted and packed:
                ranges.append((src, numel * elem_bytes, int(desc["wire_word"])))
            elif counted:
                boxes.append(idx)
    return table, launches, boxes, ranges


def plan_installed(descs: Descs) -> tuple[Descs, Launches, list[int]]:
    """The same for a digest of the destinations as they are."""
    table = descs.copy()
    launches, boxes = Launches(), []
    for idx, desc in enumerate(table):
        if int(np.prod(desc["extent"])) == 0 or int(desc["wire_word"]) == (1 << 64) - 1:
            continue
        desc["op"], desc["src_stride"] = d.UNPACK_COPY, desc["dst_stride"]
        if not _plan_words(launches, idx, desc, 0, installed=True):
            boxes.append(idx)
    return table, launches, boxes


def _is_packed(strides: npt.NDArray[np.int64], extents: npt.NDArray[np.int64]) -> bool:
    strides, extents = strides[None, :].copy(), extents.copy()
    merged(strides, extents)
    return int(np.prod(extents[:3])) == 1 and (int(strides[0, 3]) == 1 or int(extents[3]) == 1)


def _plan_words(launches: Launches, idx: int, desc: np.void, src: int, installed: bool) -> bool:
    strides = np.stack([desc["dst_stride"], desc["src_stride"]])
    merged(strides, desc["extent"])
    desc["dst_stride"], desc["src_stride"] = strides
    *outer, cols = (int(n) for n in desc["extent"])
    elem_bytes = int(desc["elem_bytes"])
    row_bytes = cols * elem_bytes
    wide = int(desc["op"]) == d.UNPACK_COPY and src % 16 == 0 and (strides[:, 3] == 1).all()
    if not (wide and aligned_rows(int(desc["dst"]), strides[:, :3].ravel(), elem_bytes, row_bytes)):
        return False
    shape = configs.fitting(configs.WORD_TILES, row_bytes // 8)
    units = grid(idx, tiles(int(np.prod(outer)), shape[0]), tiles(row_bytes // 8, shape[1]))
    launches.add(("unpack_words", installed, *shape), units)
    return True


def plan_amax(descs: Descs) -> Launches:
    """Launches that raise amax cells."""
    launches = Launches()
    for idx, desc in enumerate(descs):
        rows, cols = (int(n) for n in desc["extent"])
        if rows and cols:
            op = int(desc["recipe_op"])
            add_tiles(launches, "amax_tiles", idx, desc, (rows, cols), op, 1,
                      is_wide(desc, desc["src_stride"], cols, 0))  # fmt: skip
    return launches


def plan_scales(descs: Descs) -> Launches:
    """Launches that make scales of amax cells."""
    launches = Launches()
    for idx, desc in enumerate(descs):
        rows, cols = (int(n) for n in desc["extent"])
        if rows == 0 or cols == 0:
            continue
        op = int(desc["recipe_op"])
        lines, cells = 1, 1
        if op == d.OP_FP8_CHANNEL:
            cells = rows
        elif op in _LOOP_OPS:
            lines = tiles(rows + int(desc["row_phase"]), configs.TILE)
            cells = tiles(cols + int(desc["col_phase"]), configs.TILE)
        launches.add(("scales_of_cells", op), grid(idx, lines, tiles(cells, configs.CELLS)))
    return launches
