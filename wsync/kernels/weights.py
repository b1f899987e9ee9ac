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

    Conjugated and negated views, read-only arrays and arrays with negative strides are copied.

    Raises:
        ConfigError: a tensor whose memory was freed.
        DtypeMismatchError: it is none of these, or has no plain memory of its own: a sparse tensor, or a subclass that
            dispatches (DTensor, FakeTensor).
    """
    tensor: Tensor = weight if isinstance(weight, Tensor) else _from_dlpack(weight)
    _check_memory(tensor)
    plain: Tensor = tensor.detach().as_subclass(Tensor)
    return plain.resolve_conj().resolve_neg()


def _from_dlpack(weight: Any) -> Tensor:
    if not hasattr(weight, "__dlpack__"):
        raise DtypeMismatchError(
            f"a weight is a tensor, an array or an object with __dlpack__, but it is {type(weight).__name__}"
        )
    if isinstance(weight, np.ndarray) and (not weight.flags.writeable or min(weight.strides, default=0) < 0):
        weight = weight.copy(order="C")  # DLPack has no read-only arrays, and torch no negative strides
    try:
        return torch.utils.dlpack.from_dlpack(weight)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        dtype = getattr(weight, "dtype", "an unknown dtype")
        raise DtypeMismatchError(f"torch cannot take a weight of {type(weight).__name__} with {dtype}: {e}") from e


def _check_memory(weight: Tensor) -> None:
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise DtypeMismatchError(
            f"a weight is a tensor with memory of its own, but it is a {kind.__name__} of shape {tuple(weight.shape)}",
            hint="pass the local tensor, such as DTensor.to_local() or DTensor.full_tensor()",
        )
    if weight.layout != torch.strided:
        raise DtypeMismatchError(f"a weight has the layout torch.strided, but it has {weight.layout}")
    if weight.device.type == "cpu" and weight.numel():
        span = 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
        needed = (weight.storage_offset() + span) * weight.element_size()
        held = weight.untyped_storage().nbytes()
        if held < needed:
            raise ConfigError(f"a weight of shape {tuple(weight.shape)} needs {needed} bytes, its storage has {held}")


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
        ConfigError: the backend is unknown, or the weight is not in CPU memory (or its memory was freed).
        DtypeMismatchError: the recipe does not take this dtype, or the weight is no plain tensor: see `as_tensor`.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is; it names the first one.
        RecipeError: the recipe is unknown or does not take this shape.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; known are {', '.join(BACKENDS)}")
    tensor = as_tensor(weight)
    if tensor.device.type != "cpu":
        raise ConfigError(f"backend {backend!r} quantizes CPU memory, but the weight is on {tensor.device}")
    check_weight(tensor, recipe)
    if backend == "reference" or recipe not in _OPS:
        return quantize_reference(tensor, recipe)
    return _quantize_cpu(tensor, recipe)


def dequantize(parts: dict[str, Tensor], recipe: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode the parts of one weight: ``q * scale`` in f32, cast once to ``dtype``.

    Raises:
        ConfigError: a part is not in CPU memory (or its memory was freed).
        DtypeMismatchError: a part has a dtype that the recipe does not write, or is no plain tensor: see `as_tensor`.
        RecipeError: the recipe is unknown, or one of its parts is missing.
        ShapeMismatchError: the scales are not the grid of the weight.
    """
    tensors = {name: as_tensor(part) for name, part in parts.items()}
    for name, part in tensors.items():
        if part.device.type != "cpu":
            raise ConfigError(f"dequantize reads CPU memory, but {name!r} is on {part.device}")
    return dequantize_reference(tensors, recipe, dtype)


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
