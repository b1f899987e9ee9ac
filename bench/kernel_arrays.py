"""Weights far larger than the caches, what is made of them, and descriptors of both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wsync.plan.descriptors import (
    AMAX_DESC,
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_CHANNEL,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    TRANSFORM_DESC,
    UNPACK_DESC,
)

SOURCE_BYTES = 128 << 20


class PackCase(NamedTuple):
    """What a benchmark packs.

    Attributes:
        op: operation.
        src_dtype: of the source, which always has two bytes.
        halves: bytes that two values take in the bucket: 4 for a copy, 2 for fp8, 1 for e2m1.
        scale_bytes: of one scale.
        scale_block: rows and columns of one scale block; 0 columns: the whole row. None: no scales in a table.
        needs_amax: whether a first pass over the source finds the amax of the matrix.
    """

    op: int
    src_dtype: int
    halves: int
    scale_bytes: int = 4
    scale_block: tuple[int, int] | None = None
    needs_amax: bool = False


PACK_CASES = {
    "copy": PackCase(OP_COPY, SRC_BYTES, 4),
    "copy_checked": PackCase(OP_COPY, SRC_BF16, 4),
    "bf16": PackCase(OP_BF16, SRC_BF16, 4),
    "fp8_block128": PackCase(OP_FP8_BLOCK128, SRC_BF16, 2, 4, (128, 128)),
    "fp8_block128_f32": PackCase(OP_FP8_BLOCK128_F32, SRC_BF16, 2, 4, (128, 128)),
    "fp8_channel": PackCase(OP_FP8_CHANNEL, SRC_BF16, 2, 4, (1, 0)),
    "fp8_tensor": PackCase(OP_FP8_TENSOR, SRC_BF16, 2, needs_amax=True),
    "mxfp8": PackCase(OP_MXFP8, SRC_BF16, 2, 1, (1, 32)),
    "nvfp4": PackCase(OP_NVFP4, SRC_BF16, 1, 1, (1, 16), needs_amax=True),
}
QUANTISED = tuple(name for name, case in PACK_CASES.items() if case.halves < 4)


def aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + 4096, np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + nbytes]


class Arrays:
    """bf16 Gaussian weights, and room for what is made of them."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * np.float32(0.02)
        self.src = aligned(SOURCE_BYTES)
        self.src.view(np.uint16)[:] = np.resize((values.view(np.uint32) >> 16).astype(np.uint16), SOURCE_BYTES // 2)
        self.dst = aligned(SOURCE_BYTES)
        self.dst[:] = 0
        self.codes = aligned(SOURCE_BYTES // 2)
        self.scales = np.zeros(SOURCE_BYTES // 2 // 16, np.uint8)
        self.amax = np.zeros(SOURCE_BYTES // 2, np.float32)
        self.tensor_scales = np.zeros(SOURCE_BYTES // 2, np.float32)

    def pack_descs(self, case: PackCase, rows: int, cols: int) -> np.ndarray:
        """Matrices of ``rows x cols`` that fill the source, packed one after the other."""
        numel = rows * cols
        descs = np.zeros(SOURCE_BYTES // (2 * numel), PACK_DESC)
        i = np.arange(len(descs), dtype=np.uint64)
        descs["src"] = np.uint64(self.src.ctypes.data) + i * np.uint64(2 * numel)
        descs["src_stride"] = (0, 0, cols, 1)
        descs["extent"] = (1, 1, rows, cols)
        descs["dst_offset"] = i * np.uint64(numel // 2 * case.halves)
        descs["wire_word"] = descs["dst_offset"] // 8
        if case.scale_block is not None:
            grid_rows, grid_cols = rows // case.scale_block[0], cols // (case.scale_block[1] or cols)
            step = np.uint64(grid_rows * grid_cols * case.scale_bytes)
            descs["scales"] = np.uint64(self.scales.ctypes.data) + i * step
            descs["scale_stride"] = grid_cols
        if case.needs_amax:
            descs["amax"] = np.uint64(self.amax.ctypes.data) + i * np.uint64(4)
        descs["op"], descs["src_dtype"], descs["elem_bytes"] = case.op, case.src_dtype, 2
        return descs

    def amax_descs(self, packs: np.ndarray) -> np.ndarray:
        """The first pass over the same matrices; their tensor scales are made from it."""
        descs = np.zeros(len(packs), AMAX_DESC)
        descs["src"], descs["src_stride"], descs["extent"] = (
            packs["src"],
            packs["src_stride"][:, 2:],
            packs["extent"][:, 2:],
        )
        descs["amax"], descs["src_dtype"], descs["recipe_op"] = packs["amax"], packs["src_dtype"], packs["op"]
        descs["scales"] = np.uint64(self.tensor_scales.ctypes.data) + np.arange(
            len(packs), dtype=np.uint64
        ) * np.uint64(4)
        return descs

    def dequantise_descs(self, packs: np.ndarray, dst_base: int) -> np.ndarray:
        """What ``packs`` left in `codes` and its scales, to bf16."""
        rows, cols = (int(n) for n in packs["extent"][0, 2:])
        nvfp4 = packs["op"][0] == OP_NVFP4
        descs = np.zeros(len(packs), TRANSFORM_DESC)
        i = np.arange(len(packs), dtype=np.uint64)
        descs["codes"] = np.uint64(self.codes.ctypes.data) + packs["dst_offset"]
        descs["code_stride"] = cols // 2 if nvfp4 else cols
        descs["extent"] = (rows, cols)
        descs["scales"], descs["scale_stride"] = packs["scales"], packs["scale_stride"]
        if nvfp4:
            descs["tensor_scale"] = self._tensor_scales(len(packs))
        elif packs["op"][0] == OP_FP8_TENSOR:
            descs["scales"] = self._tensor_scales(len(packs))
        descs["dst"] = np.uint64(dst_base) + i * np.uint64(2 * rows * cols)
        descs["dst_stride"] = (cols, 1)
        descs["recipe_op"], descs["dst_dtype"] = packs["op"], SRC_BF16
        return descs

    def _tensor_scales(self, count: int) -> np.ndarray:
        return np.uint64(self.tensor_scales.ctypes.data) + np.arange(count, dtype=np.uint64) * np.uint64(4)

    def unpack_descs(self, rows: int, cols: int, stride: int) -> np.ndarray:
        numel = rows * cols
        descs = np.zeros(SOURCE_BYTES // (2 * rows * stride), UNPACK_DESC)
        i = np.arange(len(descs), dtype=np.uint64)
        descs["dst"] = np.uint64(self.dst.ctypes.data) + i * np.uint64(2 * rows * stride)
        descs["dst_stride"] = (0, 0, stride, 1)
        descs["src_stride"] = (0, 0, cols, 1)
        descs["extent"] = (1, 1, rows, cols)
        descs["src_offset"] = i * np.uint64(2 * numel)
        descs["wire_word"] = descs["src_offset"] // 8
        descs["elem_bytes"] = 2
        return descs
