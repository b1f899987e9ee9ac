"""`quantize_triton`: whole weights through the Triton kernels."""

from __future__ import annotations

from math import prod
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from wsync.errors import ConfigError
from wsync.formats.reference import check_weight, nonfinite_error
from wsync.kernels.matrices import OP_OF_RECIPE, SRC_OF_DTYPE
from wsync.kernels.triton import ops
from wsync.kernels.triton.checks import Descs
from wsync.kernels.triton.support import interpreted
from wsync.plan.descriptors import AMAX_DESC, NUM_DIMS, PACK_DESC
from wsync.spec.recipes import get_recipe


def quantize_triton(weight: Tensor, recipe: str) -> dict[str, Tensor]:
    """Encode one weight by ``recipe`` on its own device, with its values as given (f32 is not rounded to bf16 first).

    Works on the device's current stream, and waits: a bad value is an error here and now.

    Args:
        weight: ``[..., N, K]`` in bf16, f16 or f32 (any dtype for ``raw``), any strides, on a CUDA device, or on the
            host in Triton's interpreter.
        recipe: a name of `wsync.spec.recipes.RECIPES`.

    Returns:
        The parts of `wsync.quantize`, on the weight's device; the same bits as from every other backend.

    Raises:
        ConfigError: the weight is on another kind of device.
        DtypeMismatchError: the recipe does not take this dtype.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is; it names the first one.
        RecipeError: the recipe is unknown or does not take this shape.
    """
    needed = "cpu" if interpreted() else "cuda"
    if weight.device.type != needed:
        raise ConfigError(f"the backend 'triton' quantizes {needed} memory, but the weight is on {weight.device}")
    weight = weight.detach()
    check_weight(weight, recipe)
    if recipe not in OP_OF_RECIPE:
        return {"weight": weight.clone(memory_format=torch.contiguous_format)}
    parts = _empty_parts(weight, recipe)
    facts = get_recipe(recipe)
    count = prod(weight.shape[:-2])
    cells = torch.zeros(max(count, 1), dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        _scales_of_nothing(weight, recipe, parts)
        return parts
    descs = _pack_descs(weight, recipe, parts)
    if facts.needs_amax:
        regions = _amax_descs(weight, descs["src"], recipe, parts, cells)
        if (found := ops.amax(regions, device=weight.device)) is not None:
            _refuse(weight, recipe, *found)
        ops.scales_from_amax(regions, device=weight.device)
        descs["amax"] = regions["amax"]
    if (bad := ops.pack(descs, parts["weight"].data_ptr(), device=weight.device).bad) is not None:
        _refuse(weight, recipe, *bad)
    return parts


def _refuse(weight: Tensor, recipe: str, matrix_idx: int, element: int) -> NoReturn:
    index = np.unravel_index(matrix_idx * prod(weight.shape[-2:]) + element, tuple(weight.shape))
    where = tuple(int(i) for i in index)
    raise nonfinite_error(where, float(weight[where]), recipe)


def _empty_parts(weight: Tensor, recipe: str) -> dict[str, Tensor]:
    facts, shape, device = get_recipe(recipe), tuple(weight.shape), weight.device
    parts = {"weight": torch.empty(facts.weight_shape(shape), dtype=getattr(torch, facts.weight_dtype), device=device)}
    for level in facts.levels:
        dtype = getattr(torch, level.dtype)
        parts[f"weight{level.suffix}"] = torch.empty(level.shape(shape), dtype=dtype, device=device)
    return parts


def _scales_of_nothing(weight: Tensor, recipe: str, parts: dict[str, Tensor]) -> None:
    """What the reference gives to weights without elements: scales of an amax of zero, where there are any."""
    from wsync.formats import quantize_reference

    for name, part in quantize_reference(weight.cpu(), recipe).items():
        parts[name].copy_(part)


def _steps(part: Tensor, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Addresses of ``count`` equal shares of a contiguous part."""
    step = part.numel() // count * part.element_size()
    return (part.data_ptr() + np.arange(count, dtype=np.int64) * step).astype(np.uint64)


def _matrices(weight: Tensor) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Addresses of the matrices of the last two dimensions."""
    batch = tuple(weight.shape[:-2])
    numbers = np.arange(prod(batch), dtype=np.int64)
    at = np.unravel_index(numbers, batch) if batch else ()
    elements = sum((i * s for i, s in zip(at, weight.stride(), strict=False)), np.zeros_like(numbers))
    return (weight.data_ptr() + elements * weight.element_size()).astype(np.uint64)


def _pack_descs(weight: Tensor, recipe: str, parts: dict[str, Tensor]) -> Descs:
    """One descriptor for each matrix; ``piece_idx`` is its number."""
    matrices = _matrices(weight)
    count, dims = len(matrices), min(weight.dim(), 2)
    descs = np.zeros(count, PACK_DESC)
    descs["src"], descs["extent"] = matrices, 1
    if dims:
        descs["src_stride"][:, NUM_DIMS - dims :] = weight.stride()[-dims:]
        descs["extent"][:, NUM_DIMS - dims :] = tuple(weight.shape[-dims:])
    codes = parts["weight"]
    descs["dst_offset"] = np.arange(count) * (codes.numel() // count * codes.element_size())
    descs["op"], descs["src_dtype"] = OP_OF_RECIPE[recipe], SRC_OF_DTYPE[weight.dtype]
    descs["elem_bytes"], descs["piece_idx"] = weight.element_size(), np.arange(count)
    levels = get_recipe(recipe).levels
    if levels and levels[0].grid_dims == 2:
        scales = parts[f"weight{levels[0].suffix}"]
        descs["scales"], descs["scale_stride"] = _steps(scales, count), scales.shape[-1]
    return descs


def _amax_descs(weight: Tensor, matrices: Any, recipe: str, parts: dict[str, Tensor], cells: Tensor) -> Descs:
    """One descriptor for each matrix: its amax goes to ``cells``, the scale of the whole matrix to its part."""
    descs = np.zeros(len(matrices), AMAX_DESC)
    descs["src"] = matrices
    descs["src_stride"], descs["extent"] = weight.stride()[-2:], tuple(weight.shape[-2:])
    descs["amax"] = _steps(cells, len(descs))
    descs["scales"] = _steps(parts[f"weight{get_recipe(recipe).levels[-1].suffix}"], len(descs))
    descs["src_dtype"], descs["recipe_op"] = SRC_OF_DTYPE[weight.dtype], OP_OF_RECIPE[recipe]
    return descs
