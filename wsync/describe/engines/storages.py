"""Live memory of one engine rank, put together from boxes of checkpoint tensors and of their scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wsync.errors import RecipeError
from wsync.plan.geometry import touched_cells
from wsync.plan.grids import grids_of, to_packed
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.manifest import CopySpec, StorageSpec, TensorSpec
from wsync.spec.recipes import WHOLE, get_recipe, recipe_parts


class Piece(NamedTuple):
    """A box of a checkpoint tensor.

    Attributes:
        tensor: the tensor.
        box: in its weights.
    """

    tensor: TensorSpec
    box: Box


class _Placed(NamedTuple):
    """A box of one part of a tensor, as it lies in engine memory: row major, by itself."""

    role: str
    suffix: str
    dtype: str
    box: Box
    strides: tuple[int, ...]
    num_elements: int


class PartBoxes:
    """Boxes of a recipe's parts for boxes of weights, each found once: ranks and layers share the objects."""

    def __init__(self) -> None:
        self._found: dict[tuple[tuple[int, ...], str, str, Box], tuple[_Placed, ...]] = {}
        self._boxes: dict[Box, Box] = {}

    def of(self, piece: Piece, recipe: str) -> tuple[_Placed, ...]:
        """The weight part's box, then those of the scales that it needs.

        Raises:
            RecipeError: the recipe cannot encode the tensor, or the box cuts a block of its scales.
        """
        tensor, box = piece
        key = (tensor.shape, tensor.dtype, recipe, box)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._find(tensor, box, recipe)
        return found

    def _find(self, tensor: TensorSpec, weights: Box, recipe: str) -> tuple[_Placed, ...]:
        facts = get_recipe(recipe)
        parts = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
        _check_blocks(tensor, weights, recipe)
        packed = to_packed(weights, facts.packed)
        boxes = [packed]
        if facts.quantised:
            for part, grid in zip(parts[1:], grids_of(facts, tensor.shape).levels, strict=True):
                cells = touched_cells(packed, grid.cell)
                boxes.append(Box(cells.offset[: len(part.shape)], cells.shape[: len(part.shape)]))
        return tuple(
            _Placed(
                part.role,
                facts.suffix(part.role),
                part.dtype,
                self._boxes.setdefault(box, box),
                contiguous_strides(box.shape),
                box.num_elements,
            )
            for part, box in zip(parts, boxes, strict=True)
        )


def _check_blocks(tensor: TensorSpec, box: Box, recipe: str) -> None:
    """Refuse an edge inside of a block: its scale would belong to two ranks.

    Source: vLLM ``validate_fp8_block_shape`` refuses a cut of the inputs, and the loaders of fused projections fail at
    one of the outputs. For experts its Triton kernels take finer blocks (``refine_fp8_moe_block_shape``) and others
    take padding: layouts that depend on the kernel and are not described here.
    """
    for level in get_recipe(recipe).levels:
        for dim, step in zip((-2, -1), level.block, strict=True):
            if step == WHOLE:
                continue
            for edge in (box.offset[dim], box.end[dim]):
                if edge % step and edge != tensor.shape[dim]:
                    raise RecipeError(
                        f"recipe {recipe!r} has blocks of {step} {'rows' if dim == -2 else 'columns'}, but the layout "
                        f"cuts {tensor.name!r} of shape {tensor.shape} at {edge}",
                        hint="choose fewer tensor parallel ranks, expert parallelism, or a recipe without such blocks",
                    )


class Storages:
    """Storages, copies and recipes of one rank, in the order in which they are added."""

    def __init__(self, parts: PartBoxes) -> None:
        self._parts = parts
        self.storages: list[StorageSpec] = []
        self.copies: list[CopySpec] = []
        self.recipes: dict[str, str] = {}

    def add(self, name: str, pieces: Sequence[Piece], recipe: str, padded_elements: int = 0) -> None:
        """A storage for each part of a recipe, with the pieces one behind the other: fused rows, stacked experts.

        Args:
            name: of the storage of the weights.
            pieces: in the order of the memory; each lies row major.
            recipe: of all of them.
            padded_elements: at the end of the weights, which nothing writes.
        """
        if not pieces:
            return
        used: dict[str, int] = {}
        first: dict[str, int] = {}
        placed_of = self._parts.of
        for placed in placed_of(pieces[0], recipe):
            first[placed.role] = len(self.storages) + len(first)
            used[placed.role] = 0
        dtypes = [(p.role, name + p.suffix, p.dtype) for p in placed_of(pieces[0], recipe)]
        for piece in pieces:
            tensor = piece.tensor.name
            self.recipes[tensor] = recipe
            for role, _, _, box, strides, num_elements in placed_of(piece, recipe):
                at = used[role]
                self.copies.append(CopySpec(tensor, role, box, first[role], at, strides))
                used[role] = at + num_elements
        for role, full_name, dtype in dtypes:
            padding = padded_elements if role == "weight" else 0
            self.storages.append(StorageSpec(full_name, dtype, used[role] + padding))

    def add_strided(
        self, name: str, placed: Sequence[tuple[Piece, int, tuple[int, ...]]], dtype: str, recipe: str
    ) -> None:
        """One storage of weights whose pieces lie at given offsets with given strides."""
        idx = len(self.storages)
        total = 0
        for (tensor, box), offset, strides in placed:
            self.recipes[tensor.name] = recipe
            self.copies.append(CopySpec(tensor.name, "weight", box, idx, offset, strides))
            total += math.prod(box.shape)
        self.storages.append(StorageSpec(name, dtype, total))
