"""Blocks: maximal boxes with one set of holders and one set of needers, worked out once per class of tensors.

Two tensors are of one class if shape, dtype, shards, recipe and the boxes that each class of engine ranks needs are
equal. What is worked out here knows no names, no addresses and no single engine ranks, so it holds for every member,
and for every number of replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from wsync.errors import ConfigError, ManifestError, MissingTensorError
from wsync.plan.demand import Demand, Encoding, check_column
from wsync.plan.geometry import (
    bits,
    cut_leading,
    joined,
    owned_cells,
    partition,
    replaced,
    split_modes,
    touched_cells,
    weights_of_cells,
)
from wsync.plan.grids import Grid, Grids, grids_of, to_packed
from wsync.plan.holdings import Shards
from wsync.plan.rank_classes import mask_of
from wsync.plan.types import ALIGNMENT, MODE_COPY, MODE_FUSED, MODE_SCALED
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import PartSpec

NUM_DIMS = 4
"""Dimensions of more than one element that a piece may have: those of a descriptor."""

_ANYWHERE = (1, 1)
"""The step of a unit that may be cut between any two elements."""

Holder = tuple[int, int]
"""A trainer rank and which of its boxes of the tensor."""

NamedClaim = tuple[int, Box]
"""The number of a class of engine ranks within the claims, and a box that it needs."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A block, or a part of one: what a sender is chosen for.

    Attributes:
        part: which of the tensor's parts, the weight being the first.
        box: in the part's coordinates.
        mode: MODE_COPY, MODE_FUSED or MODE_SCALED.
        nbytes: on the wire.
        step: cuts in the last two dimensions (rows, columns) fall on multiples of these.
        holders: every rank that could send it; units of equal holders share the tuple.
        needers: mask of the classes of engine ranks that need it, as the claims number them.
        follows: index of the fused weight unit whose sender has this scale, or -1 if every holder has it.
    """

    part: int
    box: Box
    mode: int
    nbytes: int
    step: tuple[int, int]
    holders: tuple[Holder, ...]
    needers: int
    follows: int = -1

    @property
    def stage(self) -> int:
        """0 for weights, 1 for scales."""
        return min(self.part, 1)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The intersection that the tensors of one class share.

    Attributes:
        units: weights first, then scales.
        amax: (rank, shard index, box of the weight) whose amaxes are exchanged.
        grid_elements: amaxes of one tensor if any is exchanged, else 0.
    """

    units: tuple[Unit, ...]
    amax: tuple[tuple[int, int, Box], ...]
    grid_elements: int


@dataclass(frozen=True, slots=True)
class Cutting:
    """How fine blocks are cut.

    Attributes:
        bucket_bytes: size of a bucket.
        halves: cut where several ranks or trees could share the sending, so that they share it evenly.
    """

    bucket_bytes: int
    halves: bool


def intersect(
    member: Demand,
    name: str,
    shards: Shards,
    claims: tuple[list[NamedClaim], ...],
    cutting: Cutting,
    first_sink: Callable[[int], int],
) -> Blocks:
    """Intersect what the trainer ranks hold of a tensor with what the engine ranks need of it.

    Args:
        member: one of the tensors of the class.
        name: of this tensor, for messages.
        shards: of each trainer rank.
        claims: of each part, with as many dimensions as the tensor.
        cutting: how fine.
        first_sink: index of a rank of the classes of a mask, for messages.

    Raises:
        MissingTensorError: elements that a sink needs, or that a needed scale describes, are on no trainer rank.
        RecipeError: an edge of a shard is inside a group of columns that the recipe encodes together.
        ManifestError: a scale is needed that only the packing of its weight makes, and nobody takes the weight.
        ConfigError: a bucket is too small for one scale block.
    """
    return _Intersection(member, name, shards, claims, cutting, first_sink).blocks()


class _Intersection:
    """The work on one class."""

    def __init__(
        self,
        member: Demand,
        name: str,
        shards: Shards,
        claims: tuple[list[NamedClaim], ...],
        cutting: Cutting,
        first_sink: Callable[[int], int],
    ) -> None:
        self.encoding: Encoding = member.encoding
        self.group = member.group
        self.name = name
        self.claims = claims
        self.cutting = cutting
        self.first_sink = first_sink
        self.recipe = self.encoding.recipe
        shape = self.encoding.shape
        self.grids = grids_of(self.recipe, shape) if self.recipe.quantised else Grids((), None, None, False)
        self.weight_shape = self.recipe.weight_shape(shape)
        self.holders: dict[Box, list[Holder]] = {}
        for rank, boxes in enumerate(shards):
            for shard_idx, box in enumerate(boxes):
                if box.num_elements:
                    self._check_columns(rank, box)
                    self.holders.setdefault(to_packed(box, self.recipe.packed), []).append((rank, shard_idx))

    def _check_columns(self, rank: int, box: Box) -> None:
        if self.recipe.group > 1:
            for col in (box.offset[-1], box.end[-1]):
                check_column(col, self.name, self.recipe.name, f"the shard of trainer rank {rank}")

    def blocks(self) -> Blocks:
        units = self._weight_units(self.encoding.parts[0], self.claims[0])
        if not self.recipe.quantised:
            return Blocks(tuple(units), (), 0)
        self._check_bucket()
        amax = self._amax(units)
        shared = self.grids.shared
        weights = tuple(units)
        for part_idx, grid in enumerate(self.grids.levels, start=1):
            units += self._scale_units(weights, part_idx, grid)
        return Blocks(tuple(units), tuple(amax), math.prod(shared.shape) if shared and amax else 0)

    def _check_bucket(self) -> None:
        """A scale block that is packed in one pass must fit into a bucket."""
        if self.grids.packed is None:
            return
        block_bytes = math.prod(self.grids.packed.cell) * itemsize(self.encoding.parts[0].dtype)
        if self.cutting.bucket_bytes < block_bytes:
            raise ConfigError(
                f"bucket_bytes is {self.cutting.bucket_bytes}, but one scale block of {self.name!r} has {block_bytes}",
                hint=f"choose bucket_bytes of at least {-(-block_bytes // ALIGNMENT) * ALIGNMENT}",
            )

    def _weight_units(self, part: PartSpec, claims: list[NamedClaim]) -> list[Unit]:
        units: list[Unit] = []
        elem_bytes = itemsize(part.dtype)
        grid = self.grids.packed
        for box, holders, needers, _ in self._blocks(part, claims, list(self.holders.items()), []):
            pieces = [(box, MODE_SCALED if self.recipe.quantised else MODE_COPY)]
            if grid is not None:
                pieces = split_modes(box, part.shape, grid.cell)
            for piece, mode in pieces:
                step = grid.cell if grid is not None and mode == MODE_FUSED else _ANYWHERE
                units += self._units(piece, mode, 0, elem_bytes, step, holders, needers)
        return units

    def _blocks(
        self, part: PartSpec, claims: list[NamedClaim], held: list[tuple[Box, list[Holder]]], extra: list[Box]
    ) -> list[tuple[Box, tuple[Holder, ...], int, int]]:
        """Boxes with their holders, needers and the one of the disjoint ``extra`` boxes that has them, or -1."""
        wants: dict[Box, int] = {}
        for number, box in claims:
            wants[box] = wants.get(box, 0) | 1 << number
        wanted = list(wants)
        boxes = [*wanted, *(b for b, _ in held), *extra]
        known: dict[int, tuple[Holder, ...]] = {}
        needed, holding = (1 << len(wanted)) - 1, ((1 << len(held)) - 1) << len(wanted)
        out = []
        for box, mask in partition(boxes, needed):
            needers = 0
            for i in bits(mask & needed):
                needers |= wants[wanted[i]]
            holders = known.get(mask & holding)
            if holders is None:
                holders = known[mask & holding] = _holders(held, (mask & holding) >> len(wanted))
            if not holders:
                raise self._missing(part, box, needers)
            extra_idx = (mask >> (len(wanted) + len(held))).bit_length() - 1
            out.append((box, holders, needers, extra_idx))
        return out

    def _missing(self, part: PartSpec, box: Box, needers: int) -> MissingTensorError:
        return MissingTensorError(
            f"sink {self.first_sink(needers)} needs {self.name + part.name!r} of shape {part.shape}, but no trainer "
            f"rank holds its box at offset {box.offset} of shape {box.shape}",
            hint="the trainer ranks' shards must cover every element that an engine needs: check their layout",
        )

    def _units(
        self,
        box: Box,
        mode: int,
        part_idx: int,
        elem_bytes: int,
        step: tuple[int, int],
        holders: tuple[Holder, ...],
        needers: int,
        follows: int = -1,
    ) -> list[Unit]:
        """One unit, or several where a descriptor could not describe it or where the sending is to be shared."""
        capacity = self.cutting.bucket_bytes if self.cutting.halves else None
        out = []
        for part in _describable(box, mode, elem_bytes):
            for piece in _halved(part, elem_bytes, step, capacity):
                nbytes = piece.num_elements * elem_bytes
                out.append(Unit(part_idx, piece, mode, nbytes, step, holders, needers, follows))
        return out

    def _amax(self, units: list[Unit]) -> list[tuple[int, int, Box]]:
        """The parts of shards whose amaxes are exchanged."""
        grid = self.grids.shared
        if grid is None:
            return []
        whole = Box.whole(self.weight_shape)
        areas = [whole] if self.grids.always else self._cut_areas(units, grid)
        held = list(self.holders)
        out: list[tuple[int, int, Box]] = []
        for area in areas:
            uncovered = [box for box, mask in partition([area, *held], 1) if mask == 1]
            if uncovered:
                raise self._no_amax(uncovered[0])
            for box, holders in self.holders.items():
                common = box.intersect(area)
                if common is not None:
                    out += [(rank, shard_idx, common) for rank, shard_idx in holders]
        return sorted(out)

    def _no_amax(self, box: Box) -> MissingTensorError:
        needers = mask_of(number for claims in self.claims for number, _ in claims)
        if needers:
            return self._missing(self.encoding.parts[0], box, needers)
        return MissingTensorError(
            f"{self.name!r} shares its amax with {', '.join(self.group)}, but no trainer rank holds its "
            f"box at offset {box.offset} of shape {box.shape}",
            hint="the trainer ranks' shards must cover all tensors of a scale group",
        )

    def _cut_areas(self, units: list[Unit], grid: Grid) -> list[Box]:
        """The weights of the needed scales that no single unit has as a whole."""
        whole = [touched_cells(u.box, grid.cell) for u in units if u.mode == MODE_FUSED]
        cut = [touched_cells(u.box, grid.cell) for u in units if u.mode == MODE_SCALED]
        cut += [box for _, box in self.claims[1]]
        cut = list(dict.fromkeys(cut))
        found = partition([*cut, *whole], (1 << len(cut)) - 1)
        cells = joined([(box, 0) for box, mask in found if not mask >> len(cut)])
        return [weights_of_cells(box, self.weight_shape, grid.cell) for box, _ in cells]

    def _scale_units(self, weights: tuple[Unit, ...], part_idx: int, grid: Grid) -> list[Unit]:
        """Scales, cut so that each box follows one fused unit where the choice of its sender is open."""
        part, claims = self.encoding.parts[part_idx], self.claims[part_idx]
        held = [(owned_cells(box, grid.cell), holders) for box, holders in self.holders.items()]
        fused = [i for i, u in enumerate(weights) if u.mode == MODE_FUSED] if grid is self.grids.packed else []
        if grid is not self.grids.shared:
            self._check_packed(part, claims, [touched_cells(weights[i].box, grid.cell) for i in fused])
        open_idx = [i for i in fused if len(weights[i].holders) > 1]
        cells = [touched_cells(weights[i].box, grid.cell) for i in open_idx]
        out: list[Unit] = []
        elem_bytes = itemsize(part.dtype)
        for box, holders, needers, extra_idx in self._blocks(part, claims, held, cells):
            follows = open_idx[extra_idx] if extra_idx >= 0 else -1
            out += self._units(box, MODE_COPY, part_idx, elem_bytes, _ANYWHERE, holders, needers, follows)
        return out

    def _check_packed(self, part: PartSpec, claims: list[NamedClaim], made: list[Box]) -> None:
        """Refuse scales that only the packing of their weights makes, where no engine rank takes the weights."""
        wanted = list(dict.fromkeys(box for _, box in claims))
        for box, mask in partition([*wanted, *made], (1 << len(wanted)) - 1):
            if not mask >> len(wanted):
                needers = mask_of(number for number, b in claims if b.intersect(box))
                raise ManifestError(
                    f"sink {self.first_sink(needers)} needs {self.name + part.name!r} at offset {box.offset} "
                    f"of shape {box.shape}, but no engine rank takes the weights that it scales; recipe "
                    f"{self.recipe.name!r} makes both together"
                )


def _holders(held: list[tuple[Box, list[Holder]]], mask: int) -> tuple[Holder, ...]:
    """Every rank that has one of the boxes of ``mask``, and which of its boxes does."""
    ranks: dict[int, int] = {}
    for i in bits(mask):
        for rank, shard_idx in held[i][1]:
            ranks.setdefault(rank, shard_idx)
    return tuple(sorted(ranks.items()))


def _describable(box: Box, mode: int, elem_bytes: int) -> list[Box]:
    """Cut the outer dimensions until a descriptor can hold the rest.

    A quantising operation takes one matrix; several share a piece only where each starts at a multiple of ALIGNMENT.
    """
    limit = NUM_DIMS
    if mode != MODE_COPY:
        rows, cols = box.shape[-2:]
        if len(box.shape) > 2 and rows * cols * elem_bytes % ALIGNMENT:
            limit = 2
    return _with_dims(box, limit, 2 if mode != MODE_COPY else 0)


def _with_dims(box: Box, limit: int, inner: int) -> list[Box]:
    """Cut until at most ``limit`` dimensions have several elements; the ``inner`` last ones count always."""
    ndim = len(box.shape)
    long = [d for d in range(ndim) if box.shape[d] > 1 or d >= ndim - inner]
    if len(long) <= limit:
        return [box]
    dim = long[0]
    steps = range(box.offset[dim], box.end[dim])
    return [b for at in steps for b in _with_dims(replaced(box, dim, at, at + 1), limit, inner)]


def _halved(box: Box, elem_bytes: int, step: tuple[int, int], capacity: int | None) -> list[Box]:
    """Cut to parts of at most ``capacity`` bytes each; not at all where it is None."""
    if capacity is None:
        return [box]
    out: list[Box] = []
    todo = [box]
    while todo:
        part = todo.pop()
        cut = None
        if part.num_elements * elem_bytes > capacity:
            cut = cut_leading(part, elem_bytes, capacity, capacity, step)
        if cut is None:
            out.append(part)
        else:
            out.append(cut[0])
            todo += reversed(cut[1])
    return out
