"""Recipes: how a tensor's values are encoded on the wire. Names, part shapes and scale grids, no arithmetic.

The arithmetic is in `wsync.formats` (reference) and `wsync.kernels`. A recipe is versioned by its name: a change of
one bit in its output is a new name.
"""

from __future__ import annotations

import math

import msgspec

from wsync.errors import RecipeError
from wsync.spec.dtypes import itemsize

SCALE_BLOCK = 128
"""Rows and columns of one scale block of the ``fp8_block128`` recipes."""


class PartSpec(msgspec.Struct, frozen=True):
    """One tensor that a recipe writes: what an engine's checkpoint of that format would hold.

    Attributes:
        name: full checkpoint name, such as ``layers.0.mlp.down_proj.weight_scale_inv``.
        role: ``"weight"`` or ``"scale"``.
        dtype: torch name.
        shape: global shape in elements.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole part."""
        return itemsize(self.dtype) * math.prod(self.shape)


class Recipe(msgspec.Struct, frozen=True):
    """A recipe's static facts.

    Attributes:
        name: the recipe.
        block: rows and columns of one scale block, or ``(1, 1)`` for a recipe without scales.
        scale_suffix: appended to the weight's name to name its scales, or empty.
    """

    name: str
    block: tuple[int, int]
    scale_suffix: str

    @property
    def quantised(self) -> bool:
        """Whether the recipe has scales."""
        return bool(self.scale_suffix)


RECIPES: dict[str, Recipe] = {
    "raw": Recipe("raw", (1, 1), ""),
    "bf16": Recipe("bf16", (1, 1), ""),
    "fp8_block128": Recipe("fp8_block128", (SCALE_BLOCK, SCALE_BLOCK), "_scale_inv"),
    "fp8_block128_f32": Recipe("fp8_block128_f32", (SCALE_BLOCK, SCALE_BLOCK), "_scale_inv"),
}
"""``raw`` copies bytes of any dtype (buffers, router biases kept in f32); ``bf16`` copies bf16 and rounds f32 (RNE)."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: there is none.
    """
    try:
        return RECIPES[name]
    except KeyError:
        known = ", ".join(RECIPES)
        raise RecipeError(f"recipe {name!r} is unknown; known are {known}") from None


def scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight: the last two dimensions divided by the block, rounded up."""
    *batch, rows, cols = shape
    return (*batch, -(-rows // block[0]), -(-cols // block[1]))


def recipe_parts(name: str, shape: tuple[int, ...], dtype: str, recipe: str) -> tuple[PartSpec, ...]:
    """The parts that ``recipe`` writes for the tensor ``name`` of ``shape`` and ``dtype``: weight first, then scales.

    Raises:
        RecipeError: the recipe cannot encode a tensor of this rank or dtype.
    """
    facts = get_recipe(recipe)
    if recipe == "raw":
        return (PartSpec(name, "weight", dtype, shape),)
    if dtype not in ("bfloat16", "float32"):
        raise RecipeError(f"recipe {recipe!r} takes bfloat16 or float32, but {name!r} is {dtype}")
    if recipe == "bf16":
        return (PartSpec(name, "weight", "bfloat16", shape),)
    if len(shape) < 2:
        raise RecipeError(f"recipe {recipe!r} takes tensors of 2 or more dimensions, but {name!r} has shape {shape}")
    return (
        PartSpec(name, "weight", "float8_e4m3fn", shape),
        PartSpec(name + facts.scale_suffix, "scale", "float32", scale_grid(shape, facts.block)),
    )
