"""`quantize` and `dequantize` for whole weights: the recipes as functions of tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsync.errors import ConfigError, DtypeMismatchError
from wsync.formats import dequantize_reference, quantize_reference
from wsync.formats.reference import check_weight, nonfinite_error
from wsync.kernels.ops import pack
from wsync.plan.descriptors import (
    NUM_DIMS,
    OP_BF16,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    PACK_DESC,
    SRC_BF16,
    SRC_F16,
    SRC_F32_EXACT,
)
from wsync.spec.recipes import SCALE_BLOCK, scale_grid

BACKENDS = ("auto", "cpu", "reference")

_SRC_DTYPES = {torch.bfloat16: SRC_BF16, torch.float16: SRC_F16, torch.float32: SRC_F32_EXACT}
_OPS = {"bf16": OP_BF16, "fp8_block128": OP_FP8_BLOCK128, "fp8_block128_f32": OP_FP8_BLOCK128_F32}


def as_tensor(weight: Any) -> Tensor:
    """A tensor over the memory of ``weight``: a tensor, a NumPy array, or anything that speaks DLPack.

    Raises:
        DtypeMismatchError: it is none of these.
    """
    if isinstance(weight, Tensor):
        return weight.detach()
    if hasattr(weight, "__dlpack__"):
        if isinstance(weight, np.ndarray) and not weight.flags.writeable:
            weight = weight.copy()  # DLPack has no read-only arrays
        return torch.utils.dlpack.from_dlpack(weight)
    raise DtypeMismatchError(
        f"a weight is a tensor, an array or an object with __dlpack__, but it is {type(weight).__name__}"
    )


def quantize(weight: Any, recipe: str, backend: str = "auto") -> dict[str, Tensor]:
    """Encode one weight by ``recipe``, with its values as given (f32 is not rounded to bf16 first).

    Args:
        weight: ``[..., N, K]`` in bf16, f16 or f32 (any dtype for ``raw``), any strides: a tensor, a NumPy array or an
            object with ``__dlpack__``. The last two dimensions are the matrix.
        recipe: a name of `wsync.spec.recipes.RECIPES`.
        backend: ``"cpu"`` (compiled kernels), ``"reference"`` (plain torch), or ``"auto"``: ``"cpu"``. All give the
            same bits.

    Returns:
        The parts under the engines' names: ``weight`` (contiguous, same shape), and for an fp8 recipe
        ``weight_scale_inv`` (f32 ``[..., ceil(N/128), ceil(K/128)]``, the multiplier that gives the weight back).

    Raises:
        ConfigError: the backend is unknown, or the weight is not in CPU memory.
        DtypeMismatchError: the recipe does not take this dtype.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is; it names the first one.
        RecipeError: the recipe is unknown or does not take this shape.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; known are {', '.join(BACKENDS)}")
    tensor = as_tensor(weight)
    if tensor.device.type != "cpu":
        raise ConfigError(f"backend {backend!r} quantizes CPU memory, but the weight is on {tensor.device}")
    check_weight(tensor, recipe)
    if backend == "reference" or recipe == "raw":
        return quantize_reference(tensor, recipe)
    return _quantize_cpu(tensor, recipe)


def dequantize(parts: dict[str, Tensor], recipe: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode the parts of one weight: ``q * scale`` in f32, cast once to ``dtype``.

    Raises:
        RecipeError: the recipe is unknown, or one of its parts is missing.
    """
    return dequantize_reference(parts, recipe, dtype)


def _quantize_cpu(weight: Tensor, recipe: str) -> dict[str, Tensor]:
    parts = _empty_parts(weight, recipe)
    if weight.numel() == 0:
        return parts
    bad = pack(_descriptors(weight, recipe, parts), parts["weight"].data_ptr()).bad
    if bad is not None:
        matrix_idx, element = bad
        index = np.unravel_index(matrix_idx * prod(weight.shape[-2:]) + element, tuple(weight.shape))
        where = tuple(int(i) for i in index)
        raise nonfinite_error(where, float(weight[where]), recipe)
    return parts


def _empty_parts(weight: Tensor, recipe: str) -> dict[str, Tensor]:
    if recipe == "bf16":
        return {"weight": torch.empty(weight.shape, dtype=torch.bfloat16)}
    grid = scale_grid(tuple(weight.shape), (SCALE_BLOCK, SCALE_BLOCK))
    return {
        "weight": torch.empty(weight.shape, dtype=torch.float8_e4m3fn),
        "weight_scale_inv": torch.empty(grid, dtype=torch.float32),
    }


def _descriptors(weight: Tensor, recipe: str, parts: dict[str, Tensor]) -> np.ndarray[Any, np.dtype[np.void]]:
    """One descriptor for each matrix of the last two dimensions; ``piece_idx`` is the matrix's number."""
    batch = tuple(weight.shape[:-2])
    descs = np.zeros(prod(batch), PACK_DESC)
    numbers = np.arange(len(descs), dtype=np.int64)
    batch_idx = np.unravel_index(numbers, batch) if batch else ()
    elements = sum((i * s for i, s in zip(batch_idx, weight.stride(), strict=False)), np.zeros_like(numbers))
    descs["src"] = (weight.data_ptr() + elements * weight.element_size()).astype(np.uint64)
    matrix = min(weight.dim(), 2)
    descs["src_stride"][:, NUM_DIMS - matrix :] = weight.stride()[-matrix:] if matrix else ()
    descs["extent"] = 1
    descs["extent"][:, NUM_DIMS - matrix :] = tuple(weight.shape[-matrix:]) if matrix else ()
    descs["dst_offset"] = numbers * (prod(weight.shape[-2:]) * parts["weight"].element_size())
    descs["op"] = _OPS[recipe]
    descs["src_dtype"] = _SRC_DTYPES[weight.dtype]
    descs["elem_bytes"] = weight.element_size()
    descs["piece_idx"] = numbers
    if (scales := parts.get("weight_scale_inv")) is not None:
        descs["scales"] = (scales.data_ptr() + numbers * (4 * prod(scales.shape[-2:]))).astype(np.uint64)
        descs["scale_stride"] = scales.shape[-1]
    return descs
