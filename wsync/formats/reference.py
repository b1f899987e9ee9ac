"""Reference arithmetic of the recipes: plain torch, obviously right, slow. The kernels must give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from wsync.errors import DtypeMismatchError, NonFiniteError, RecipeError, ShapeMismatchError
from wsync.formats.bf16 import round_to_bf16
from wsync.formats.fp8_block128 import dequantize_block128, quantize_block128
from wsync.spec.recipes import get_recipe, scale_grid

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a recipe that rounds can take."""


def part_names(recipe: str) -> tuple[str, ...]:
    """Keys of the parts of ``recipe``: ``weight``, and the scales under the engines' own name."""
    suffix = get_recipe(recipe).scale_suffix
    return ("weight", f"weight{suffix}") if suffix else ("weight",)


def check_weight(weight: Tensor, recipe: str) -> None:
    """Refuse what ``recipe`` cannot encode, before its values are looked at.

    Raises:
        DtypeMismatchError: the dtype is not one of bf16, f16, f32.
        RecipeError: the recipe is unknown, or its matrix has less than two dimensions.
    """
    facts = get_recipe(recipe)
    if recipe == "raw":
        return
    if weight.dtype not in FLOAT_DTYPES:
        raise DtypeMismatchError(
            f"recipe {recipe!r} takes bfloat16, float16 or float32, but the weight is {weight.dtype}"
        )
    if facts.quantised and weight.dim() < 2:
        raise RecipeError(
            f"recipe {recipe!r} takes tensors of 2 or more dimensions, but the weight has shape {tuple(weight.shape)}"
        )


def nonfinite_error(index: tuple[int, ...], value: float, recipe: str) -> NonFiniteError:
    """The error for a weight whose element ``index`` is ``value``."""
    return NonFiniteError(f"recipe {recipe!r} takes finite weights, but element {index} is {value}")


def first_nonfinite(weight: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinite element in row-major order."""
    bad = torch.nonzero(~torch.isfinite(weight))
    return tuple(int(i) for i in bad[0]) if len(bad) else None


def quantize_reference(weight: Tensor, recipe: str) -> dict[str, Tensor]:
    """Encode ``weight``, with its values as given, by ``recipe``.

    Args:
        weight: ``[..., N, K]`` in bf16, f16 or f32 on the CPU; any strides. The last two dimensions are the matrix.
        recipe: a name of `wsync.spec.recipes.RECIPES`.

    Returns:
        ``weight`` (contiguous, same shape) and, for an fp8 recipe, ``weight_scale_inv`` (f32, one for each block).

    Raises:
        DtypeMismatchError: the recipe does not take this dtype.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is.
        RecipeError: the recipe is unknown or does not take this shape.
    """
    check_weight(weight, recipe)
    if recipe == "raw":
        return {"weight": weight.clone(memory_format=torch.contiguous_format)}
    values = weight.contiguous()
    rounded = round_to_bf16(values.to(torch.float32)) if recipe == "bf16" else values
    if (index := first_nonfinite(rounded)) is not None:
        raise nonfinite_error(index, float(values[index]), recipe)
    if recipe == "bf16":
        return {"weight": rounded}
    codes, scales = quantize_block128(values, power_of_two=recipe == "fp8_block128")
    return {"weight": codes, "weight_scale_inv": scales}


def dequantize_reference(parts: dict[str, Tensor], recipe: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode what `quantize_reference` (or an engine's checkpoint) holds for one weight.

    Args:
        parts: ``weight`` and, for an fp8 recipe, ``weight_scale_inv``.
        recipe: how they were encoded.
        dtype: of the result; the value is computed in f32 and cast once.

    Raises:
        DtypeMismatchError: an fp8 recipe's weight is not e4m3 (or its codes as uint8), or its scales are not f32.
        RecipeError: the recipe is unknown, or one of its parts is missing.
        ShapeMismatchError: the scales are not the grid of the weight.
    """
    for name in part_names(recipe):
        if name not in parts:
            raise RecipeError(
                f"recipe {recipe!r} has the parts {part_names(recipe)}, but {name!r} is not in {sorted(parts)}"
            )
    if recipe in ("raw", "bf16"):
        return parts["weight"].to(dtype)
    codes, scales = parts["weight"], parts["weight_scale_inv"]
    _check_block128(codes, scales, recipe)
    return dequantize_block128(codes, scales).to(dtype)


def _check_block128(codes: Tensor, scales: Tensor, recipe: str) -> None:
    if codes.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise DtypeMismatchError(f"recipe {recipe!r} has weights of torch.float8_e4m3fn, but this one is {codes.dtype}")
    if scales.dtype != torch.float32:
        raise DtypeMismatchError(f"recipe {recipe!r} has scales of torch.float32, but these are {scales.dtype}")
    shape = tuple(codes.shape)
    if len(shape) < 2:
        raise ShapeMismatchError(f"recipe {recipe!r} has weights of 2 or more dimensions, but this one has {shape}")
    grid = scale_grid(shape, get_recipe(recipe).block)
    if tuple(scales.shape) != grid:
        raise ShapeMismatchError(
            f"a weight of shape {shape} has scales of shape {grid} in recipe {recipe!r}, but these have "
            f"{tuple(scales.shape)}"
        )
