"""Stand-ins for the recipes' arithmetic that tell who knew which amax, and their application to whole tensors.

Positive values only. What counts is that a code cannot be right with the amax of another block, group or tensor.
"""

from __future__ import annotations

import numpy as np

from wsync.plan.grids import Grid, grids_of
from wsync.spec.box import Box
from wsync.spec.recipes import get_recipe, recipe_parts


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


def cells_of(rows: np.ndarray, cols: np.ndarray, grid: Grid, packed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale row and column of every weight at the global ``rows`` and columns ``cols``."""
    return np.broadcast_arrays(rows[:, None] // grid.cell[0], cols[None, :] // packed // grid.cell[1])


def raise_amax(values: np.ndarray, weights: Box, grid: Grid, packed: int, out: np.ndarray) -> None:
    """Raise every cell of ``out`` to the largest of ``values``, which lie at the box ``weights``, in its block."""
    rows, cols = (np.arange(weights.offset[d], weights.end[d]) for d in (-2, -1))
    index = cells_of(rows, cols, grid, packed)
    for i in np.ndindex(values.shape[:-2]):
        batch = tuple(o + k for o, k in zip(weights.offset, i, strict=False))
        np.maximum.at(out[batch], index, values[i])


def expanded(cells: np.ndarray, weights: Box, grid: Grid, packed: int) -> np.ndarray:
    """What the grid ``cells`` has for every weight of a box."""
    rows, cols = (np.arange(weights.offset[d], weights.end[d]) for d in (-2, -1))
    batch = tuple(slice(o, e) for o, e in zip(weights.offset[:-2], weights.end[:-2], strict=True))
    return cells[batch][(..., *cells_of(rows, cols, grid, packed))]


def scales_of(recipe: str, amax: np.ndarray, tensor_amax: np.ndarray | None) -> np.ndarray:
    """Scales of f32 amaxes of blocks, as numbers (f32 that are small integers where a scale is a byte)."""
    if recipe == "mxfp8":
        return np.float32(amax.astype(np.float64) * 7 % 251 // 1)
    if recipe == "nvfp4" and tensor_amax is not None:
        return np.float32(amax.astype(np.float64) / tensor_amax * 200 // 1)
    return amax


def codes_of(recipe: str, values: np.ndarray, scale: np.ndarray, tensor_amax: np.ndarray | None) -> np.ndarray:
    """Bytes ``[..., rows, cols / packed]`` of values with the scale of each and the amax of the whole tensor."""
    mixed = values.astype(np.float64) * 13 // 1 + scale.astype(np.float64) * 7 // 1
    if tensor_amax is not None:
        mixed = mixed + np.asarray(tensor_amax).astype(np.float64) * 3 // 1
    if recipe == "nvfp4":
        code = (mixed % 16).astype(np.uint8)
        return code[..., 0::2] | code[..., 1::2] << 4
    return (mixed % 251).astype(np.uint8)


def as_bytes(scales: np.ndarray, grid: Grid) -> np.ndarray:
    """Scales as the wire has them, ``[..., elem_bytes]``."""
    raw = scales.astype(np.uint8) if grid.elem_bytes == 1 else np.ascontiguousarray(scales.astype("<f4"))
    return raw.reshape(-1).view(np.uint8).reshape(*scales.shape, grid.elem_bytes)


def matrix_amaxes(values: np.ndarray) -> np.ndarray:
    """``[..., 1, 1]``: of each matrix."""
    return values.max(axis=(-2, -1), keepdims=True).astype(np.float32)


def whole_parts(tensor, values: np.ndarray, recipe: str, group_amax: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every part of a tensor, quantised in one go: role -> bytes ``[*part shape, elem_bytes]``.

    ``group_amax`` ``[..., 1, 1]`` is that of the scale group; None for the tensor's own.
    """
    facts = get_recipe(recipe)
    grids = grids_of(facts, tensor.shape)
    whole = Box.whole(tensor.shape)
    tensor_amax = None
    if grids.always:
        tensor_amax = matrix_amaxes(values) if group_amax is None else group_amax
    out = {}
    scale = np.zeros((1,) * values.ndim)
    if grids.packed is not None:
        amax = np.zeros(grids.packed.shape, np.float32)
        raise_amax(values, whole, grids.packed, facts.packed, amax)
        scales = scales_of(recipe, amax, tensor_amax)
        out[grids.packed.role] = as_bytes(scales, grids.packed)
        scale = expanded(scales, whole, grids.packed, facts.packed)
    if tensor_amax is not None:
        out[grids.shared.role] = as_bytes(tensor_amax, grids.shared)
    out["weight"] = codes_of(recipe, values, scale, tensor_amax)[..., None]
    for part in recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe):
        out[part.role] = out[part.role].reshape(*part.shape, -1)
    return out


def group_amaxes(scenario_source, ranks, values) -> dict:
    """(rank index, checkpoint name) -> amax of its scale group, for every tensor that is in one."""
    by_name = {t.name: i for i, t in enumerate(scenario_source.tensors)}
    target = {t.name: by_name[t.alias_of or t.name] for t in scenario_source.tensors}
    out = {}
    for rank_idx, rank in enumerate(ranks):
        for names in rank.scale_groups:
            amax = np.max([matrix_amaxes(values[target[n]]) for n in names], axis=0)
            out.update({(rank_idx, name): amax for name in names})
    return out
