"""Whole weights as descriptors: what `wsync.quantize` and `wsync.dequantize` give to the compiled kernels."""

from __future__ import annotations

from math import prod
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsync.formats import dequantize_reference, part_names, quantize_reference
from wsync.formats.reference import nonfinite_error
from wsync.plan.descriptors import (
    AMAX_DESC,
    NUM_DIMS,
    OP_BF16,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_CHANNEL,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
    PACK_DESC,
    SRC_BF16,
    SRC_F16,
    SRC_F32_EXACT,
    TRANSFORM_DEQUANTISE,
    TRANSFORM_DESC,
)
from wsync.spec.recipes import get_recipe

SRC_OF_DTYPE = {torch.bfloat16: SRC_BF16, torch.float16: SRC_F16, torch.float32: SRC_F32_EXACT}
OP_OF_RECIPE = {
    "bf16": OP_BF16,
    "fp8_block128": OP_FP8_BLOCK128,
    "fp8_block128_f32": OP_FP8_BLOCK128_F32,
    "fp8_channel": OP_FP8_CHANNEL,
    "fp8_tensor": OP_FP8_TENSOR,
    "mxfp8": OP_MXFP8,
    "nvfp4": OP_NVFP4,
}
"""What each recipe that rounds is to the kernels, for boxes of whole scale blocks."""

_Addresses = npt.NDArray[np.uint64]
_Descs = npt.NDArray[np.void]


def quantize_with(kernels: Any, weight: Tensor, recipe: str) -> dict[str, Tensor]:
    """Encode a weight that `wsync.formats.reference.check_weight` accepts, in memory that ``kernels`` reach.

    ``kernels`` has the operations of `wsync.kernels.ops`. Other arguments and errors are those of `wsync.quantize`.
    """
    if weight.numel() == 0:
        return quantize_reference(weight, recipe)
    parts = _empty_parts(weight, recipe)
    matrices = _addresses(weight)
    descs = _pack_descs(weight, matrices, recipe, parts)
    if get_recipe(recipe).needs_amax:
        cells = torch.zeros(len(matrices), dtype=torch.float32, device=weight.device)
        regions = _amax_descs(weight, matrices, recipe, parts, cells)
        if (found := kernels.amax(regions)) is not None:
            _refuse(weight, recipe, *found)
        kernels.scales_from_amax(regions)
        descs["amax"] = regions["amax"]
    if (bad := kernels.pack(descs, parts["weight"].data_ptr()).bad) is not None:
        _refuse(weight, recipe, *bad)
    return parts


def dequantize_with(kernels: Any, parts: list[Tensor], recipe: str, dtype: torch.dtype) -> Tensor:
    """Decode contiguous parts that `wsync.formats.reference.check_parts` accepts, in the order of `part_names`."""
    codes, scales = parts[0], parts[1]
    if codes.numel() == 0:
        return dequantize_reference(dict(zip(part_names(recipe), parts, strict=True)), recipe, dtype)
    facts = get_recipe(recipe)
    *batch, rows, stored_cols = codes.shape
    shape = (*batch, rows, stored_cols * facts.packed)
    weight = torch.empty(shape, dtype=dtype if dtype in SRC_OF_DTYPE else torch.float32, device=codes.device)
    descs = np.zeros(prod(batch), TRANSFORM_DESC)
    descs["codes"] = _addresses(codes)
    descs["code_stride"] = stored_cols
    descs["extent"] = weight.shape[-2:]
    descs["scales"] = _steps(scales, len(descs))
    descs["scale_stride"] = scales.shape[-1] if scales.dim() == codes.dim() else 0
    if len(parts) > 2:
        descs["tensor_scale"] = _steps(parts[2], len(descs))
    descs["dst"] = _addresses(weight)
    descs["dst_stride"] = weight.stride()[-2:]
    descs["recipe_op"] = OP_OF_RECIPE[recipe]
    descs["op"] = TRANSFORM_DEQUANTISE
    descs["dst_dtype"] = SRC_OF_DTYPE[weight.dtype]
    kernels.transform(descs)
    return weight.to(dtype)


def _refuse(weight: Tensor, recipe: str, matrix_idx: int, element: int) -> NoReturn:
    index = np.unravel_index(matrix_idx * prod(weight.shape[-2:]) + element, tuple(weight.shape))
    where = tuple(int(i) for i in index)
    raise nonfinite_error(where, float(weight[where]), recipe)


def _empty_parts(weight: Tensor, recipe: str) -> dict[str, Tensor]:
    facts = get_recipe(recipe)
    shape, device = tuple(weight.shape), weight.device
    parts = {"weight": torch.empty(facts.weight_shape(shape), dtype=getattr(torch, facts.weight_dtype), device=device)}
    for level in facts.levels:
        parts[f"weight{level.suffix}"] = torch.empty(
            level.shape(shape), dtype=getattr(torch, level.dtype), device=device
        )
    return parts


def _addresses(weight: Tensor) -> _Addresses:
    """Of the first element of each matrix of the last two dimensions."""
    batch = tuple(weight.shape[:-2])
    numbers = np.arange(prod(batch), dtype=np.int64)
    batch_idx = np.unravel_index(numbers, batch) if batch else ()
    elements = sum((i * s for i, s in zip(batch_idx, weight.stride(), strict=False)), np.zeros_like(numbers))
    return (weight.data_ptr() + elements * weight.element_size()).astype(np.uint64)


def _steps(part: Tensor, count: int) -> _Addresses:
    """Addresses of ``count`` equal shares of a contiguous part."""
    step = part.numel() // count * part.element_size()
    return (part.data_ptr() + np.arange(count, dtype=np.int64) * step).astype(np.uint64)


def _pack_descs(weight: Tensor, matrices: _Addresses, recipe: str, parts: dict[str, Tensor]) -> _Descs:
    """One descriptor for each matrix; ``piece_idx`` is the matrix's number."""
    descs = np.zeros(len(matrices), PACK_DESC)
    descs["src"] = matrices
    dims = min(weight.dim(), 2)
    descs["src_stride"][:, NUM_DIMS - dims :] = weight.stride()[-dims:] if dims else ()
    descs["extent"] = 1
    descs["extent"][:, NUM_DIMS - dims :] = tuple(weight.shape[-dims:]) if dims else ()
    codes = parts["weight"]
    descs["dst_offset"] = np.arange(len(descs)) * (codes.numel() // len(descs) * codes.element_size())
    descs["op"] = OP_OF_RECIPE[recipe]
    descs["src_dtype"] = SRC_OF_DTYPE[weight.dtype]
    descs["elem_bytes"] = weight.element_size()
    descs["piece_idx"] = np.arange(len(descs))
    facts = get_recipe(recipe)
    if facts.levels and facts.levels[0].grid_dims == 2:
        scales = parts[f"weight{facts.levels[0].suffix}"]
        descs["scales"] = _steps(scales, len(descs))
        descs["scale_stride"] = scales.shape[-1]
    return descs


def _amax_descs(weight: Tensor, matrices: _Addresses, recipe: str, parts: dict[str, Tensor], cells: Tensor) -> _Descs:
    """One descriptor for each matrix: its amax goes to ``cells``, the scale of the whole matrix to its part."""
    descs = np.zeros(len(matrices), AMAX_DESC)
    descs["src"] = matrices
    descs["src_stride"] = weight.stride()[-2:]
    descs["extent"] = tuple(weight.shape[-2:])
    descs["amax"] = _steps(cells, len(descs))
    descs["scales"] = _steps(parts[f"weight{get_recipe(recipe).levels[-1].suffix}"], len(descs))
    descs["src_dtype"] = SRC_OF_DTYPE[weight.dtype]
    descs["recipe_op"] = OP_OF_RECIPE[recipe]
    return descs
