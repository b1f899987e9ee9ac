"""Value transforms of the sink: engines that hold other values than the wire carries.

``dequantise``: the engine holds floats, the wire carries a quantised recipe (what the other engines of the job get, or
half of the bytes). ``requantise_e8m0``: the engine's kernels read power-of-two scales, and its own loading requantises
a 128 x 128 checkpoint to them. Codes and scales arrive in scratch memory, are verified there, and are transformed into
live memory at the commit, on the engine's thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from wsync import kernels
from wsync.adapters.engines.coverage import Coverage
from wsync.adapters.engines.recorder import Recording
from wsync.errors import CommitError, ConfigError, RecipeError
from wsync.plan.demand import check_column
from wsync.plan.descriptors import (
    SRC_BF16,
    SRC_F16,
    SRC_F32,
    TRANSFORM_DEQUANTISE,
    TRANSFORM_DESC,
    TRANSFORM_REQUANT_E8M0,
)
from wsync.plan.geometry import touched_cells
from wsync.plan.grids import Grid, Grids, grids_of, to_packed
from wsync.plan.program import StorageMemory
from wsync.plan.source_program import RECIPE_OPS
from wsync.session.laststep import LastSteps, Repack
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import CopySpec, StorageSpec, TensorSpec
from wsync.spec.recipes import SCALE_BLOCK, PartSpec, Recipe, get_recipe, recipe_parts

DEQUANTISE = "dequantise"
REQUANTISE = "requantise_e8m0"
TRANSFORMS = (DEQUANTISE, REQUANTISE)

_DST_DTYPES = {"bfloat16": SRC_BF16, "float16": SRC_F16, "float32": SRC_F32}


@dataclass
class _Target:
    """What is transformed into one live storage.

    Attributes:
        name: of the live tensor.
        storages: scratch storages that it is made of.
        rows: fields of TRANSFORM_DESC.
        tensors: the checkpoint tensor of each row.
        scratch: the memory of those storages; the last step keeps it alive.
    """

    name: str
    storages: list[int] = field(default_factory=list)
    rows: list[tuple[object, ...]] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    scratch: list[torch.Tensor] = field(default_factory=list)

    def repack(self, num_threads: int) -> Repack:
        """The last step that runs them."""
        descs = np.array([(*row, i) for i, row in enumerate(self.rows)], TRANSFORM_DESC)

        def commit() -> None:
            bad = kernels.transform(descs, num_threads)  # reads self.scratch
            if bad is not None:
                raise CommitError(f"{self.tensors[bad[0]]!r} is not finite once it is transformed into {self.name!r}")

        return Repack(self.name, frozenset(self.storages), prepare=_nothing, commit=commit)


def _nothing() -> None:
    """Scratch memory is all that a transform prepares."""


def check_transforms(
    transforms: Mapping[str, str], tensors: Sequence[TensorSpec], recipe_of: Callable[[str], str]
) -> None:
    """Refuse transforms that do not fit the recipes.

    Raises:
        ConfigError: a transform is unknown, or for a tensor that the trainer does not have.
        RecipeError: the tensor's recipe has nothing to transform.
    """
    names = {t.name for t in tensors}
    for name, transform in transforms.items():
        if transform not in TRANSFORMS:
            raise ConfigError(f"transform {transform!r} of {name!r} is unknown; known are {', '.join(TRANSFORMS)}")
        if name not in names:
            raise ConfigError(f"transforms names {name!r}, which is no tensor of the trainer's {len(names)}")
        recipe = get_recipe(recipe_of(name))
        if not recipe.quantised or (transform == REQUANTISE and recipe.block != (SCALE_BLOCK, SCALE_BLOCK)):
            needed = "a quantising recipe" if transform == DEQUANTISE else "scales of 128 x 128 blocks"
            raise RecipeError(f"transform {transform!r} takes {needed}, but {name!r} has recipe {recipe.name!r}")


def plain_recipe(spec: TensorSpec) -> str:
    """How a tensor is offered to a loader whose engine holds it as floats."""
    return "bf16" if spec.dtype in ("bfloat16", "float32") else "raw"


def with_transforms(
    recording: Recording,
    tensors: Sequence[TensorSpec],
    transforms: Mapping[str, str],
    wire_recipes: Mapping[str, str],
    num_threads: int,
) -> tuple[Recording, LastSteps]:
    """A recording whose transformed tensors arrive in scratch memory, and the last steps that transform them.

    Args:
        recording: of the loader; it was offered `plain_recipe` of the tensors that are dequantised.
        tensors: the name table.
        transforms: by checkpoint name.
        wire_recipes: what travels, of each of them.
        num_threads: of the transform kernel.

    Raises:
        ConfigError: the engine does not hold a tensor in a form that the transform writes.
    """
    work = _Work(recording, {t.name: t for t in tensors}, transforms, wire_recipes)
    done = work.recording_()
    repacks = tuple(target.repack(num_threads) for target in work.targets.values())
    steps = recording.last_steps()
    return done, replace(steps, repacks=(*steps.repacks, *repacks))


class _Work:
    def __init__(
        self,
        recording: Recording,
        specs: Mapping[str, TensorSpec],
        transforms: Mapping[str, str],
        wire_recipes: Mapping[str, str],
    ) -> None:
        self.recording = recording
        self.specs = specs
        self.transforms = transforms
        self.recipes = {**recording.recipes, **{n: r for n, r in wire_recipes.items() if n in recording.recipes}}
        self.copies: list[CopySpec] = []
        self.storages = list(recording.storages)
        self.memory = list(recording.memory)
        self.kept: list[torch.Tensor] = []
        self.targets: dict[int, _Target] = {}
        self.live_bytes: dict[int, int] = {}

    def recording_(self) -> Recording:
        for copy in self.recording.copies:
            transform = self.transforms.get(copy.tensor)
            if transform is None:
                self.copies.append(copy)
                continue
            nbytes = copy.box.num_elements * itemsize(self.storages[copy.storage_idx].dtype)
            self.live_bytes[copy.storage_idx] = self.live_bytes.get(copy.storage_idx, 0) + nbytes
            if copy.role == "weight" and copy.box.num_elements:
                self._transform(copy, transform)
        return replace(
            self.recording,
            recipes=self.recipes,
            storages=tuple(self.storages),
            copies=tuple(self.copies),
            memory=self.memory,
            coverage=self._coverage(),
            scratch=tuple(self.kept),
        )

    def _coverage(self) -> Coverage:
        coverage = self.recording.coverage
        storages = list(coverage.storages)
        for idx, nbytes in self.live_bytes.items():
            was = storages[idx]
            storages[idx] = replace(was, direct_bytes=max(0, was.direct_bytes - nbytes), transformed_bytes=nbytes)
        return replace(coverage, storages=tuple(storages))

    def _transform(self, copy: CopySpec, transform: str) -> None:
        spec, recipe = self.specs[copy.tensor], get_recipe(self.recipes[copy.tensor])
        storage = self.storages[copy.storage_idx]
        if transform == DEQUANTISE and storage.dtype not in _DST_DTYPES:
            raise ConfigError(
                f"{copy.tensor!r} cannot be dequantised into {storage.name!r}, which is {storage.dtype}; allowed are "
                f"{', '.join(_DST_DTYPES)}"
            )
        if copy.storage_idx >= len(self.recording.storages) - len(self.recording.widened):
            raise ConfigError(f"{copy.tensor!r} is widened into the engine's memory; it cannot be transformed as well")
        for edge in (copy.box.offset[-1], copy.box.end[-1]):
            check_column(edge, copy.tensor, recipe.name, f"what {storage.name!r} takes")
        target = self.targets.setdefault(copy.storage_idx, _Target(storage.name))
        parts = {p.role: p for p in recipe_parts(spec.name, spec.shape, spec.dtype, recipe.name)}
        grids = grids_of(recipe, spec.shape)
        weights = copy.box
        first = {"weight": self._scratch(target, copy, parts["weight"], to_packed(weights, recipe.packed))}
        cells = {g.role: touched_cells(to_packed(weights, recipe.packed), g.cell) for g in grids.levels}
        for grid in grids.levels:
            num_dims = len(parts[grid.role].shape)
            box = Box(cells[grid.role].offset[:num_dims], cells[grid.role].shape[:num_dims])
            first[grid.role] = self._scratch(target, copy, parts[grid.role], box)
        for index in itertools.product(*(range(n) for n in weights.shape[:-2])):
            target.rows.append(self._row(copy, transform, recipe, grids, index, first, cells))
            target.tensors.append(copy.tensor)

    def _scratch(self, target: _Target, copy: CopySpec, part: PartSpec, box: Box) -> int:
        """Room for a box of a part; returns its address."""
        memory = torch.zeros(max(box.num_elements, 1) * itemsize(part.dtype), dtype=torch.uint8)
        self.kept.append(memory)
        target.scratch.append(memory)
        idx = len(self.storages)
        self.storages.append(StorageSpec(f"{part.name} for {target.name}", part.dtype, box.num_elements))
        self.memory.append(StorageMemory(memory.data_ptr(), box.num_elements, part.dtype))
        self.copies.append(CopySpec(copy.tensor, part.role, box, idx, 0, contiguous_strides(box.shape)))
        target.storages.append(idx)
        return int(memory.data_ptr())

    def _row(
        self,
        copy: CopySpec,
        transform: str,
        recipe: Recipe,
        grids: Grids,
        index: tuple[int, ...],
        first: Mapping[str, int],
        cells: Mapping[str, Box],
    ) -> tuple[object, ...]:
        rows, cols = copy.box.shape[-2:]
        row_bytes = cols // recipe.packed
        number = int(np.ravel_multi_index(index, copy.box.shape[:-2])) if index else 0
        main = grids.levels[0]
        grid_rows, grid_cols = cells[main.role].shape[-2:]
        scales = first[main.role] + number * grid_rows * grid_cols * main.elem_bytes
        tensor_scale = first[grids.levels[1].role] + number * 4 if len(grids.levels) > 1 else 0
        storage = self.storages[copy.storage_idx]
        element = copy.dst_offset + sum(i * s for i, s in zip(index, copy.dst_strides, strict=False))
        dst = self.memory[copy.storage_idx].address + element * itemsize(storage.dtype)
        phases = (0, 0)
        if recipe.block == (SCALE_BLOCK, SCALE_BLOCK):
            phases = (copy.box.offset[-2] % SCALE_BLOCK, copy.box.offset[-1] % SCALE_BLOCK)
        dst_scales, dst_scale_stride, op, dst_dtype = 0, 0, TRANSFORM_DEQUANTISE, SRC_BF16
        if transform == DEQUANTISE:
            dst_dtype = _DST_DTYPES[storage.dtype]
        else:
            op = TRANSFORM_REQUANT_E8M0
            dst_scales, dst_scale_stride = self._live_scales(copy, main, index, cells[main.role])
        return (
            first["weight"] + number * rows * row_bytes,
            row_bytes,
            (rows, cols),
            scales,
            grid_cols,
            tensor_scale,
            dst,
            copy.dst_strides[-2:],
            dst_scales,
            dst_scale_stride,
            *phases,
            RECIPE_OPS[recipe.name],
            op,
            dst_dtype,
        )

    def _live_scales(self, copy: CopySpec, grid: Grid, index: tuple[int, ...], cells: Box) -> tuple[int, int]:
        """Where the engine keeps the scales of a matrix that is requantised, and their row stride."""
        edges = zip(copy.box.offset[-2:], copy.box.end[-2:], self.specs[copy.tensor].shape[-2:], strict=True)
        if any(o % SCALE_BLOCK or (e % SCALE_BLOCK and e != n) for o, e, n in edges):
            raise ConfigError(f"{copy.tensor!r} is cut inside a scale block, at {copy.box}: it cannot be requantised")
        for other in self.recording.copies:
            if (other.tensor, other.role) == (copy.tensor, grid.role) and other.box.contains(cells):
                if other.box.shape[-1] > 1 and other.dst_strides[-1] != 1:
                    break
                at = (*(o + i for o, i in zip(cells.offset, index, strict=False)), *cells.offset[-2:])
                steps = zip(at, other.box.offset, other.dst_strides, strict=True)
                element = other.dst_offset + sum((a - o) * s for a, o, s in steps)
                return self.memory[other.storage_idx].address + 4 * element, other.dst_strides[-2]
        raise ConfigError(f"the engine keeps no row-major scales beside {copy.tensor!r}: it cannot be requantised")
