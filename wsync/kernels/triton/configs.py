"""Tile shapes and warps, chosen by what was compiled, not timed: see `wsync.kernels.triton.aot` for the figures.

A tile reads 32 KiB of bf16 (64 KiB of f32), which with two or more programs on each multiprocessor covers the latency
of HBM3 (about 25 KiB in flight for each), and leaves 64 elements to each of 256 threads.
"""

from __future__ import annotations

TILE = 128
"""Rows and columns of a tile that is quantised."""
TILE_WARPS = 8

ROW_ELEMS = 16384
"""Elements of a tile of whole rows (fp8_channel)."""
LONGEST_ROW = 32768
"""Rows of more columns are read twice."""

WORD_TILES = ((64, 64), (8, 512), (1, 4096))
"""Rows and 8-byte words of a tile that is copied: the first whose words hold a row, or the last."""
ELEMENT_TILES = ((128, 32), (32, 128), (8, 512))
"""The same for elements of any strides."""
DIGEST_WORDS = 4096
"""Words of one program that digests contiguous, aligned bytes."""
GATHER_WORDS = 512
"""Words of one program that digests contiguous bytes one by one."""
BOX_WORDS = 128
"""The same for boxes of any strides, whose addresses take more registers: more words would spill."""
SEARCH_ELEMS = 4096
"""Elements of one program that looks for a bad one."""
CELLS = 1024
"""Amax cells of one program that makes scales."""

OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
"""Compile options of every kernel: no multiply and add may fuse, and there are no loops to pipeline."""


def row_tile(cols: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile that holds whole rows of ``cols`` elements, at most `LONGEST_ROW`."""
    width = max(TILE, 1 << (cols - 1).bit_length())
    if width > ROW_ELEMS:
        return 1, width, 2 * TILE_WARPS
    return ROW_ELEMS // width, width, TILE_WARPS


def fitting(tiles: tuple[tuple[int, int], ...], cols: int) -> tuple[int, int]:
    """The first of ``tiles`` that holds ``cols`` columns, or the last."""
    return next((tile for tile in tiles if cols <= tile[1]), tiles[-1])
