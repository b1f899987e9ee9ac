"""A recipe's scales as grids over one tensor, in the planner's coordinates.

The planner counts the elements that travel: columns of a weight of packed codes are bytes. A grid has as many
dimensions as its weight, also where the engine's tensor of scales has fewer; both are converted where copies come in
and where descriptors are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import Recipe, ScaleLevel, scale_grid


@dataclass(frozen=True, slots=True)
class Grid:
    """The scales of one level.

    Attributes:
        role: of the part.
        cell: rows and columns of the weight part that one scale is for.
        shape: scales in each dimension of the weight.
        elem_bytes: of one scale.
    """

    role: str
    cell: tuple[int, int]
    shape: tuple[int, ...]
    elem_bytes: int


@dataclass(frozen=True, slots=True)
class Grids:
    """All scales of one tensor in one recipe.

    Attributes:
        levels: in the order of the recipe's parts, which the weight precedes.
        packed: the level whose scales the packing operation makes, or reads where an edge cuts their cells; or None.
        shared: the level whose scales are made of amaxes that ranks exchange, or None. It may be the packed one.
        always: amaxes are exchanged for every cell of ``shared``, not only for those that an edge cuts.
    """

    levels: tuple[Grid, ...]
    packed: Grid | None
    shared: Grid | None
    always: bool


def grids_of(recipe: Recipe, shape: tuple[int, ...]) -> Grids:
    """The grids of a quantising recipe over a tensor of ``shape``, in weights."""
    levels = tuple(_grid(recipe, level, shape) for level in recipe.levels)
    if not recipe.needs_amax:
        return Grids(levels, levels[0], None if recipe.group > 1 else levels[0], False)
    return Grids(levels, levels[0] if len(levels) > 1 else None, levels[-1], True)


def _grid(recipe: Recipe, level: ScaleLevel, shape: tuple[int, ...]) -> Grid:
    rows, cols = level.cell(shape)
    cell = (rows, max(cols // recipe.packed, 1))
    return Grid(level.role, cell, scale_grid(shape, level.block), itemsize(level.dtype))


def to_packed(box: Box, packed: int) -> Box:
    """A box of weights as a box of the weight part; its columns are cut at whole elements of that."""
    return box if packed == 1 else _with_cols(box, box.offset[-1] // packed, box.shape[-1] // packed)


def to_weights(box: Box, packed: int) -> Box:
    """A box of the weight part as a box of weights."""
    return box if packed == 1 else _with_cols(box, box.offset[-1] * packed, box.shape[-1] * packed)


def _with_cols(box: Box, first: int, count: int) -> Box:
    return Box((*box.offset[:-1], first), (*box.shape[:-1], count))


def all_dims(values: tuple[int, ...], num_dims: int, fill: int) -> tuple[int, ...]:
    """Offsets, extents or strides of a part, with the dimensions of its weight that it lacks: those of one element."""
    return (*values, *(fill,) * (num_dims - len(values)))


def box_of_all_dims(box: Box, num_dims: int) -> Box:
    """A box of a part in the coordinates of its grid."""
    return (
        box if len(box.shape) == num_dims else Box(all_dims(box.offset, num_dims, 0), all_dims(box.shape, num_dims, 1))
    )


def group_of(names: Iterable[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    """A scale group as both sides name it: sorted, tied tensors under the name that travels; empty if it is one tensor.

    Args:
        names: of the tensors that share an amax.
        aliases: name of a tied tensor -> name of the tensor whose bytes travel.
    """
    found = tuple(sorted({aliases.get(name, name) for name in names}))
    return found if len(found) > 1 else ()
