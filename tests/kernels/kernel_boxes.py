"""Boxes of tensors as descriptors, for the tests of the kernels. Sources are torch tensors of any strides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wsync.kernels import isas
from wsync.plan.descriptors import (
    AMAX_DESC,
    OP_COPY,
    OP_NVFP4,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    SRC_F16,
    SRC_F32,
    SRC_F32_EXACT,
    SRC_F64,
    UNPACK_COPY,
    UNPACK_DESC,
)

ISAS = isas()

SRC_OF = {torch.bfloat16: SRC_BF16, torch.float32: SRC_F32, torch.float16: SRC_F16}
COPY_SRC_OF = {**SRC_OF, torch.float32: SRC_F32_EXACT, torch.float64: SRC_F64}


def four(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    return (fill,) * (4 - len(values)) + tuple(values)


def pack_desc(
    box: Tensor,
    op: int,
    *,
    dst_offset: int = 0,
    wire_word: int = 0,
    scales: Tensor | None = None,
    amax: Tensor | None = None,
    phase: tuple[int, int] = (0, 0),
    src_dtype: int | None = None,
    piece_idx: int = 0,
) -> np.ndarray:
    desc = np.zeros(1, PACK_DESC)
    desc["src"] = box.data_ptr()
    desc["src_stride"] = four(box.stride(), 0)
    desc["extent"] = four(tuple(box.shape), 1)
    desc["dst_offset"] = dst_offset
    desc["wire_word"] = wire_word
    if scales is not None:
        desc["scales"] = scales.data_ptr()
        desc["scale_stride"] = scales.stride(0)
    if amax is not None:
        desc["amax"] = amax.data_ptr()
    desc["row_phase"], desc["col_phase"] = phase
    desc["op"] = op
    known = COPY_SRC_OF if op == OP_COPY else SRC_OF
    desc["src_dtype"] = known.get(box.dtype, SRC_BYTES) if src_dtype is None else src_dtype
    desc["elem_bytes"] = box.element_size()
    desc["piece_idx"] = piece_idx
    return desc


def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[d + 1 :])) for d in range(len(shape)))


def unpack_desc(
    box: Tensor,
    *,
    src_stride: tuple[int, ...] | None = None,
    src_offset: int = 0,
    wire_word: int = 0,
    op: int = UNPACK_COPY,
    fill: int = 0,
    piece_idx: int = 0,
) -> np.ndarray:
    """Reads a packed box, unless ``src_stride`` (in elements) says otherwise."""
    desc = np.zeros(1, UNPACK_DESC)
    desc["dst"] = box.data_ptr()
    desc["dst_stride"] = four(box.stride(), 0)
    desc["src_stride"] = four(packed_strides(tuple(box.shape)) if src_stride is None else src_stride, 0)
    desc["op"], desc["fill"] = op, fill
    desc["extent"] = four(tuple(box.shape), 1)
    desc["src_offset"] = src_offset
    desc["wire_word"] = wire_word
    desc["elem_bytes"] = box.element_size()
    desc["piece_idx"] = piece_idx
    return desc


def amax_desc(
    box: Tensor, amax: Tensor, scales: Tensor, phase: tuple[int, int], recipe_op: int, src_dtype: int | None = None
) -> np.ndarray:
    """``amax`` and ``scales`` are the parts of the grids that begin at the box's first block."""
    desc = np.zeros(1, AMAX_DESC)
    desc["src"] = box.data_ptr()
    desc["src_stride"] = box.stride()
    desc["extent"] = tuple(box.shape)
    desc["amax"] = amax.data_ptr()
    desc["amax_stride"] = amax.stride(0)
    desc["scales"] = scales.data_ptr()
    desc["scale_stride"] = scales.stride(0)
    desc["row_phase"], desc["col_phase"] = phase
    desc["src_dtype"] = SRC_OF[box.dtype] if src_dtype is None else src_dtype
    desc["recipe_op"] = recipe_op
    return desc


def bucket(nbytes: int, fill: int = 0) -> np.ndarray:
    """A bucket whose first byte is 64-byte aligned, as staging memory is."""
    raw = np.full(nbytes + 64, fill, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's elements in row-major order, as bytes."""
    packed = torch.empty(tensor.numel(), dtype=tensor.dtype)
    packed.view(tensor.shape).copy_(tensor)
    return packed.view(torch.uint8).numpy()


def finite_bf16(rng: np.random.Generator, shape: tuple[int, ...], style: str = "normal") -> Tensor:
    """bf16 values: ``normal`` weights, ``wild`` bit patterns of any exponent, ``sparse`` with zeros of both signs."""
    if style == "wild":
        bits = rng.integers(0, 0x7F80, size=shape) | (rng.integers(0, 2, size=shape) << 15)
    else:
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.02)
        bits = values.view(np.uint32) >> 16
        if style == "sparse":
            bits = np.where(rng.random(shape) < 0.7, bits & 0x8000, bits)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def matrix_of(rng: np.random.Generator, shape: tuple[int, int], style: str, layout: str, dtype: torch.dtype) -> Tensor:
    """A matrix of ``shape`` that lies in rows, in columns, or with gaps between its columns."""
    step = 2 if layout == "steps" else 1
    stored = (shape[0], shape[1] * step)
    storage = finite_bf16(rng, stored if layout != "columns" else stored[::-1], style).to(torch.float32)
    if dtype == torch.float16:
        storage = storage.clamp(-65504, 65504)
    elif dtype == torch.float32 and style == "normal":  # values that bf16 does not have
        storage += torch.from_numpy(rng.standard_normal(storage.shape).astype(np.float32)) * 1e-5
    storage = storage.to(dtype)
    return storage.t() if layout == "columns" else storage[:, ::step]


def code_bytes(op: int, numel: int) -> int:
    return numel // 2 if op == OP_NVFP4 else numel
