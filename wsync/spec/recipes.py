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

WHOLE = 0
"""In the block of a scale level: the whole extent of the matrix."""

MXFP8_GROUP = 32
NVFP4_GROUP = 16
"""Columns that share one scale byte."""


class PartSpec(msgspec.Struct, frozen=True):
    """One tensor that a recipe writes: what an engine's checkpoint of that format would hold.

    Attributes:
        name: full checkpoint name, such as ``layers.0.mlp.down_proj.weight_scale_inv``.
        role: ``"weight"``, ``"scale"``, or ``"scale_2"`` for the second level.
        dtype: torch name.
        shape: global shape in elements of the part.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole part."""
        return itemsize(self.dtype) * math.prod(self.shape)


class ScaleLevel(msgspec.Struct, frozen=True):
    """One tensor of scales: one for each block of the weight's matrices.

    Attributes:
        role: ``"scale"`` or ``"scale_2"``.
        suffix: appended to the weight's name.
        dtype: torch name.
        block: rows and columns that share a scale, in weights; `WHOLE` for all that the matrix has.
        grid_dims: how many dimensions of a matrix's grid the tensor has; fewer than 2 where the grid is one scale.
    """

    role: str
    suffix: str
    dtype: str
    block: tuple[int, int]
    grid_dims: int = 2

    def cell(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of one block of a weight of ``shape``, with `WHOLE` resolved; at least 1 each."""
        rows, cols = self.block
        return rows or max(shape[-2], 1), cols or max(shape[-1], 1)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this tensor of scales for a weight of ``shape``."""
        grid = scale_grid(shape, self.block)
        return grid[: len(shape) - 2 + self.grid_dims]


class Recipe(msgspec.Struct, frozen=True):
    """A recipe's static facts.

    Attributes:
        name: the recipe.
        weight_dtype: torch name of the weight part, or empty for that of the source.
        levels: its tensors of scales, in the order of its parts.
        group: columns that are encoded together: the last dimension is a multiple of it, and so is every cut.
        packed: weights in one element of the weight part.
        needs_amax: whether the amax of the whole matrix, or of its scale group, must be known before any of its weights
            can be encoded.
    """

    name: str
    weight_dtype: str
    levels: tuple[ScaleLevel, ...] = ()
    group: int = 1
    packed: int = 1
    needs_amax: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the recipe has scales."""
        return bool(self.levels)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one block of the first level, with `WHOLE` as it is; ``(1, 1)`` without scales."""
        return self.levels[0].block if self.levels else (1, 1)

    @property
    def amax_block(self) -> tuple[int, int]:
        """Rows and columns whose amax ranks exchange where an edge cuts them: those of the last level."""
        return self.levels[-1].block if self.levels else (1, 1)

    def level(self, role: str) -> ScaleLevel:
        """The tensor of scales with that role.

        Raises:
            RecipeError: the recipe has none.
        """
        for level in self.levels:
            if level.role == role:
                return level
        known = ", ".join(level.role for level in self.levels) or "none"
        raise RecipeError(f"recipe {self.name!r} has no scales of the role {role!r}; it has {known}")

    def suffix(self, role: str) -> str:
        """What a part of that role appends to the weight's name; empty for ``"weight"``.

        Raises:
            RecipeError: the recipe has no such part.
        """
        return "" if role == "weight" else self.level(role).suffix

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the weight part for a weight of ``shape``."""
        return shape if self.packed == 1 else (*shape[:-1], shape[-1] // self.packed)


def _levels_block128() -> tuple[ScaleLevel, ...]:
    return (ScaleLevel("scale", "_scale_inv", "float32", (SCALE_BLOCK, SCALE_BLOCK)),)


def _recipes() -> tuple[Recipe, ...]:
    e4m3 = "float8_e4m3fn"
    channel = ScaleLevel("scale", "_scale", "float32", (1, WHOLE))
    tensor = ScaleLevel("scale", "_scale", "float32", (WHOLE, WHOLE), grid_dims=0)
    mxfp8 = ScaleLevel("scale", "_scale", "uint8", (1, MXFP8_GROUP))
    nvfp4 = ScaleLevel("scale", "_scale", e4m3, (1, NVFP4_GROUP))
    nvfp4_2 = ScaleLevel("scale_2", "_scale_2", "float32", (WHOLE, WHOLE), grid_dims=1)
    return (
        Recipe("raw", ""),
        Recipe("bf16", "bfloat16"),
        Recipe("fp8_block128", e4m3, _levels_block128()),
        Recipe("fp8_block128_f32", e4m3, _levels_block128()),
        Recipe("fp8_channel", e4m3, (channel,)),
        Recipe("fp8_tensor", e4m3, (tensor,), needs_amax=True),
        Recipe("mxfp8", e4m3, (mxfp8,), group=MXFP8_GROUP),
        Recipe("nvfp4", "uint8", (nvfp4, nvfp4_2), group=NVFP4_GROUP, packed=2, needs_amax=True),
    )


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _recipes()}
"""``raw`` copies bytes of any dtype (buffers, router biases kept in f32); ``bf16`` copies bf16 and rounds f32 (RNE).

The others write, for a weight ``[..., N, K]`` named ``w``:

=====================  ==================  ============================================================
``fp8_block128``       ``w`` e4m3          ``w_scale_inv`` f32 ``[..., ceil(N/128), ceil(K/128)]``, powers of two
``fp8_block128_f32``   ``w`` e4m3          the same, of any value
``fp8_channel``        ``w`` e4m3          ``w_scale`` f32 ``[..., N, 1]``
``fp8_tensor``         ``w`` e4m3          ``w_scale`` f32 ``[...]``, no dimension for a matrix
``mxfp8``              ``w`` e4m3          ``w_scale`` u8 (E8M0) ``[..., N, K/32]``
``nvfp4``              ``w`` u8            ``w_scale`` e4m3 ``[..., N, K/16]``, ``w_scale_2`` f32 ``[..., 1]``
                       ``[..., N, K/2]``
=====================  ==================  ============================================================
"""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: there is none.
    """
    try:
        return RECIPES[name]
    except (KeyError, TypeError):  # TypeError: no text, and not even hashable
        known = ", ".join(RECIPES)
        raise RecipeError(f"recipe {name!r} is unknown; known are {known}") from None


def scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Grid of a weight's blocks: the last two dimensions divided by the block, rounded up; 1 where that is `WHOLE`."""
    *batch, rows, cols = shape
    return (*batch, -(-rows // block[0]) if block[0] else 1, -(-cols // block[1]) if block[1] else 1)


def check_shape(name: str, shape: tuple[int, ...], recipe: str) -> None:
    """Refuse a tensor whose shape ``recipe`` cannot encode; ``name`` says which in the message.

    Raises:
        RecipeError: it is no matrix, or its last dimension is not a multiple of the recipe's group of columns.
    """
    facts = get_recipe(recipe)
    if not facts.quantised:
        return
    if len(shape) < 2:
        raise RecipeError(f"recipe {recipe!r} takes tensors of 2 or more dimensions, but {name} has shape {shape}")
    if shape[-1] % facts.group:
        raise RecipeError(
            f"recipe {recipe!r} takes a last dimension that is a multiple of {facts.group}, but {name} has shape "
            f"{shape}"
        )


def recipe_parts(name: str, shape: tuple[int, ...], dtype: str, recipe: str) -> tuple[PartSpec, ...]:
    """The parts that ``recipe`` writes for the tensor ``name`` of ``shape`` and ``dtype``: weight first, then scales.

    Raises:
        RecipeError: the recipe cannot encode a tensor of this shape or dtype.
    """
    facts = get_recipe(recipe)
    if recipe == "raw":
        return (PartSpec(name, "weight", dtype, shape),)
    taken = ("bfloat16", "float16", "float32") if facts.quantised else ("bfloat16", "float32")
    if dtype not in taken:
        raise RecipeError(f"recipe {recipe!r} takes {', '.join(taken)}, but {name!r} is {dtype}")
    check_shape(repr(name), shape, recipe)
    return (
        PartSpec(name, "weight", facts.weight_dtype, facts.weight_shape(shape)),
        *(PartSpec(name + level.suffix, level.role, level.dtype, level.shape(shape)) for level in facts.levels),
    )
