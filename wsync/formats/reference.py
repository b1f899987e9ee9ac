"""Reference arithmetic of the recipes: plain torch, obviously right, slow. The kernels must give the same bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wsync.errors import DtypeMismatchError, NonFiniteError, RecipeError, ShapeMismatchError
from wsync.formats.amax import matrix_amax
from wsync.formats.bf16 import round_to_bf16
from wsync.formats.fp8_block128 import dequantize_block128, quantize_block128
from wsync.formats.fp8_channel import dequantize_channel, quantize_channel
from wsync.formats.fp8_tensor import dequantize_tensor, quantize_tensor
from wsync.formats.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from wsync.formats.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from wsync.spec.recipes import Recipe, check_shape, get_recipe

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a recipe that rounds can take."""


_AS_STORED: dict[str, tuple[torch.dtype, ...]] = {
    "float32": (torch.float32,),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.uint8),
    "uint8": (torch.uint8, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
}
"""What memory of a part of that dtype may be called: 8-bit floats are often kept as bytes, and bytes as such floats."""


def part_names(recipe: str) -> tuple[str, ...]:
    """Keys of the parts of ``recipe``: ``weight``, and the scales under the engines' own names."""
    return ("weight", *(f"weight{level.suffix}" for level in get_recipe(recipe).levels))


def check_weight(weight: Tensor, recipe: str) -> None:
    """Refuse what ``recipe`` cannot encode, before its values are looked at.

    Raises:
        DtypeMismatchError: the dtype is not one of bf16, f16, f32.
        RecipeError: the recipe is unknown, or cannot encode this shape.
    """
    get_recipe(recipe)
    if recipe == "raw":
        return
    if weight.dtype not in FLOAT_DTYPES:
        raise DtypeMismatchError(
            f"recipe {recipe!r} takes bfloat16, float16 or float32, but the weight is {weight.dtype}"
        )
    check_shape("the weight", tuple(weight.shape), recipe)


def nonfinite_error(index: tuple[int, ...], value: float, recipe: str) -> NonFiniteError:
    """The error for a weight whose element ``index`` is ``value``."""
    rounds = ", which bf16 has no finite value for" if math.isfinite(value) else ""
    return NonFiniteError(f"recipe {recipe!r} takes finite weights, but element {index} is {value}{rounds}")


def first_nonfinite(weight: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinite element in row-major order."""
    bad = torch.nonzero(~torch.isfinite(weight))
    return tuple(int(i) for i in bad[0]) if len(bad) else None


def group_amax_of(weight: Tensor, amax: Tensor | float | None) -> Tensor:
    """The f32 amax of each matrix of a finite ``weight [..., N, K]``, or of its scale group: ``[...]``.

    Args:
        weight: in bf16, f16 or f32.
        amax: of the scale group: a number for all matrices, or one for each; ``None`` for the weight's own.

    Raises:
        RecipeError: ``amax`` is not finite, smaller than that of the weight, or of another shape.
    """
    own = matrix_amax(weight)
    if amax is None:
        return own
    given = torch.as_tensor(amax, dtype=torch.float32, device=own.device)
    if given.dim() and given.shape != own.shape:
        raise RecipeError(f"the amax of a scale group has the shape {tuple(own.shape)}, but it is {tuple(given.shape)}")
    given = given.expand(own.shape).contiguous()
    wrong = torch.nonzero(~(torch.isfinite(given) & (given >= own)))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        raise RecipeError(
            f"the amax of a scale group is finite and at least the weight's own, {float(own[index])}, but matrix "
            f"{index} has {float(given[index])}"
        )
    return given


def quantize_reference(weight: Tensor, recipe: str, amax: Tensor | float | None = None) -> dict[str, Tensor]:
    """Encode ``weight``, with its values as given, by ``recipe``.

    Args:
        weight: ``[..., N, K]`` in bf16, f16 or f32 on the CPU; any strides. The last two dimensions are the matrix.
        recipe: a name of `wsync.spec.recipes.RECIPES`.
        amax: for the recipes that need one (`wsync.spec.recipes.Recipe.needs_amax`), the largest magnitude of the scale
            group that the weight belongs to, in f32: a number for all matrices, or one for each, ``[...]``. Without it
            each matrix is a group of its own.

    Returns:
        The parts of `wsync.spec.recipes.recipe_parts` for a weight of the name ``weight``, contiguous.

    Raises:
        DtypeMismatchError: the recipe does not take this dtype.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is.
        RecipeError: the recipe is unknown, does not take this shape, or does not take this ``amax``.
    """
    check_weight(weight, recipe)
    if amax is not None and not get_recipe(recipe).needs_amax:
        raise RecipeError(f"recipe {recipe!r} takes no amax of a scale group, but one was given: {amax}")
    if recipe == "raw":
        return {"weight": weight.clone(memory_format=torch.contiguous_format)}
    values = weight.contiguous()
    rounded = round_to_bf16(values.to(torch.float32)) if recipe == "bf16" else values
    if (index := first_nonfinite(rounded)) is not None:
        raise nonfinite_error(index, float(values[index]), recipe)
    if recipe == "bf16":
        return {"weight": rounded}
    return dict(zip(part_names(recipe), _encode(values, recipe, amax), strict=True))


def _encode(values: Tensor, recipe: str, amax: Tensor | float | None) -> tuple[Tensor, ...]:
    match recipe:
        case "fp8_channel":
            return quantize_channel(values)
        case "fp8_tensor":
            return quantize_tensor(values, group_amax_of(values, amax))
        case "mxfp8":
            return quantize_mxfp8(values)
        case "nvfp4":
            return quantize_nvfp4(values, group_amax_of(values, amax))
        case _:
            return quantize_block128(values, power_of_two=recipe == "fp8_block128")


def dequantize_reference(parts: dict[str, Tensor], recipe: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode what `quantize_reference` (or an engine's checkpoint) holds for one weight.

    Args:
        parts: those of the recipe; 8-bit floats may be given as bytes.
        recipe: how they were encoded.
        dtype: of the result; the value is computed in f32 and cast once.

    Raises:
        DtypeMismatchError: a part is not of the recipe's dtype.
        RecipeError: the recipe is unknown, or one of its parts is missing.
        ShapeMismatchError: the scales are not the grid of the weight.
    """
    check_names(parts, recipe)
    if recipe in ("raw", "bf16"):
        return parts["weight"].to(dtype)
    check_parts(parts, recipe)
    return _decode([parts[name] for name in part_names(recipe)], recipe).to(dtype)


def _decode(parts: list[Tensor], recipe: str) -> Tensor:
    weight, *scales = parts
    match recipe:
        case "fp8_channel":
            return dequantize_channel(weight, scales[0])
        case "fp8_tensor":
            return dequantize_tensor(weight, scales[0])
        case "mxfp8":
            return dequantize_mxfp8(weight, scales[0])
        case "nvfp4":
            return dequantize_nvfp4(weight.view(torch.uint8), scales[0], scales[1])
        case _:
            return dequantize_block128(weight, scales[0])


def check_names(parts: dict[str, Tensor], recipe: str) -> None:
    """Refuse parts of which one is missing.

    Raises:
        RecipeError: the recipe is unknown, or one of its parts is missing.
    """
    for name in part_names(recipe):
        if name not in parts:
            raise RecipeError(
                f"recipe {recipe!r} has the parts {part_names(recipe)}, but {name!r} is not in {sorted(parts)}"
            )


def check_parts(parts: dict[str, Tensor], recipe: str) -> None:
    """Refuse parts that cannot be those of one weight in ``recipe``, which has scales.

    Raises:
        DtypeMismatchError: a part is not of the recipe's dtype.
        ShapeMismatchError: the weight is no matrix, or the scales are not its grid.
    """
    facts = get_recipe(recipe)
    weight = parts["weight"]
    _check_dtype(weight, facts.weight_dtype, recipe, "weights", "this one is")
    shape = _weight_shape(weight, facts)
    for level in facts.levels:
        scales = parts[f"weight{level.suffix}"]
        _check_dtype(scales, level.dtype, recipe, "scales", "these are")
        if tuple(scales.shape) != (grid := level.shape(shape)):
            raise ShapeMismatchError(
                f"a weight of shape {tuple(weight.shape)} has scales of shape {grid} in recipe {recipe!r}, but these "
                f"have {tuple(scales.shape)}"
            )


def _check_dtype(part: Tensor, dtype: str, recipe: str, what: str, it_is: str) -> None:
    if part.dtype not in _AS_STORED[dtype]:
        raise DtypeMismatchError(f"recipe {recipe!r} has {what} of torch.{dtype}, but {it_is} {part.dtype}")


def _weight_shape(weight: Tensor, facts: Recipe) -> tuple[int, ...]:
    """Shape in weights of a weight part."""
    shape = tuple(weight.shape)
    if len(shape) < 2:
        raise ShapeMismatchError(f"recipe {facts.name!r} has weights of 2 or more dimensions, but this one has {shape}")
    shape = (*shape[:-1], shape[-1] * facts.packed)
    if shape[-1] % facts.group:
        raise ShapeMismatchError(
            f"recipe {facts.name!r} has weights with a multiple of {facts.group} columns, but this one has {shape[-1]}"
        )
    return shape
