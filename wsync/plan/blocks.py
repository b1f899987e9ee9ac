"""Blocks: maximal boxes with one set of holders and one set of needers, worked out once per class of tensors.

Two tensors are of one class if shape, dtype, shards, recipe and the sinks' boxes are equal. What is worked out here
knows no names and no addresses, so it holds for every member.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wsync.errors import ConfigError, MissingTensorError
from wsync.plan.demand import Claim, Demand
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
from wsync.plan.nodes import Nodes
from wsync.plan.types import ALIGNMENT, MODE_COPY, MODE_FUSED, MODE_SCALED
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SourceManifest, TensorSpec
from wsync.spec.recipes import PartSpec, get_recipe

NUM_DIMS = 4
"""Dimensions of more than one element that a piece may have: those of a descriptor."""

Holder = tuple[int, int]
"""A trainer rank and which of its boxes of the tensor."""


@dataclass(frozen=True, slots=True)
class Route:
    """The sinks of a unit that one sender serves, and the ranks that could be it."""

    candidates: tuple[Holder, ...]
    sinks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A block, or a part of one: what a sender is chosen for.

    Attributes:
        stage: 0 for weights, 1 for scales.
        box: in the part's coordinates.
        mode: MODE_COPY, MODE_FUSED or MODE_SCALED.
        elem_bytes: of one element on the wire.
        nbytes: on the wire.
        step: cuts in the last two dimensions fall on multiples of it.
        holders: every rank that could send it.
        routes: who needs it.
        follows: index of the fused weight unit whose sender has this scale, or -1 if every holder has it.
    """

    stage: int
    box: Box
    mode: int
    elem_bytes: int
    nbytes: int
    step: int
    holders: tuple[Holder, ...]
    routes: tuple[Route, ...]
    follows: int = -1


@dataclass(frozen=True, slots=True)
class TensorClass:
    """Tensors that share their intersection.

    Attributes:
        units: weights first, then scales.
        amax: (rank, shard index, box of the weight) with scale blocks that an edge cuts.
        grid_elements: scales of one tensor if any of its blocks is cut, else 0.
        members: the demands of this class, in order of tensor.
    """

    units: tuple[Unit, ...]
    amax: tuple[tuple[int, int, Box], ...]
    grid_elements: int
    members: list[Demand]


def find_classes(source: SourceManifest, demands: list[Demand], nodes: Nodes, bucket_bytes: int) -> list[TensorClass]:
    """Group demands by class, in order of first member, and intersect each class once.

    Raises:
        MissingTensorError: elements that a sink needs, or that a needed scale describes, are on no trainer rank.
        ConfigError: a bucket is too small for one scale block.
    """
    classes: dict[object, TensorClass] = {}
    for demand in demands:
        if not any(demand.claims):
            continue
        tensor = source.tensors[demand.tensor_idx]
        shards = source.shards[demand.tensor_idx]
        claims = tuple(tuple(c) for c in demand.claims)
        key = (tensor.shape, tensor.dtype, demand.recipe, shards, claims)
        found = classes.get(key)
        if found is None:
            found = classes[key] = _Intersection(tensor, shards, demand, nodes, bucket_bytes).tensor_class()
        found.members.append(demand)
    return list(classes.values())


class _Intersection:
    """The work on one class."""

    def __init__(
        self,
        tensor: TensorSpec,
        shards: tuple[tuple[Box, ...], ...],
        demand: Demand,
        nodes: Nodes,
        bucket_bytes: int,
    ) -> None:
        self.tensor = tensor
        self.demand = demand
        self.nodes = nodes
        self.bucket_bytes = bucket_bytes
        self.recipe = get_recipe(demand.recipe)
        self.holders: dict[Box, list[Holder]] = {}
        for rank, boxes in enumerate(shards):
            for shard_idx, box in enumerate(boxes):
                if box.num_elements:
                    self.holders.setdefault(box, []).append((rank, shard_idx))

    def tensor_class(self) -> TensorClass:
        weight = self.demand.parts[0]
        units = self._weight_units(weight, self.demand.claims[0])
        if not self.recipe.quantised:
            return TensorClass(tuple(units), (), 0, [])
        block_bytes = self.recipe.block[0] * self.recipe.block[1] * itemsize(weight.dtype)
        if self.bucket_bytes < block_bytes:
            raise ConfigError(
                f"bucket_bytes is {self.bucket_bytes}, but one scale block of {weight.name!r} has {block_bytes}"
            )
        amax = self._amax(units, self.demand.claims[1])
        grid = math.prod(self.demand.parts[1].shape) if amax else 0
        units += self._scale_units(units, self.demand.parts[1], self.demand.claims[1])
        return TensorClass(tuple(units), tuple(amax), grid, [])

    def _weight_units(self, part: PartSpec, claims: list[Claim]) -> list[Unit]:
        units: list[Unit] = []
        elem_bytes = itemsize(part.dtype)
        for box, holders, sinks, _ in self._blocks(part, claims, list(self.holders.items()), []):
            pieces = [(box, MODE_COPY)]
            if self.recipe.quantised:
                pieces = split_modes(box, part.shape, self.recipe.block)
            for piece, mode in pieces:
                step = self.recipe.block[0] if mode == MODE_FUSED else 1
                units += self._units(piece, mode, 0, elem_bytes, step, holders, sinks)
        return units

    def _blocks(
        self, part: PartSpec, claims: list[Claim], held: list[tuple[Box, list[Holder]]], extra: list[Box]
    ) -> list[tuple[Box, tuple[Holder, ...], tuple[int, ...], int]]:
        """Boxes with their holders, needers and the one of the disjoint ``extra`` boxes that has them, or -1."""
        needers: dict[Box, list[int]] = {}
        for sink_idx, box in claims:
            needers.setdefault(box, []).append(sink_idx)
        wanted = list(needers)
        boxes = [*wanted, *(b for b, _ in held), *extra]
        out = []
        for box, mask in partition(boxes, (1 << len(wanted)) - 1):
            ranks: dict[int, int] = {}
            sinks: set[int] = set()
            extra_idx = -1
            for i in bits(mask):
                if i < len(wanted):
                    sinks.update(needers[wanted[i]])
                elif i < len(wanted) + len(held):
                    for rank, shard_idx in held[i - len(wanted)][1]:
                        ranks.setdefault(rank, shard_idx)
                else:
                    extra_idx = i - len(wanted) - len(held)
            if not ranks:
                raise self._missing(part, box, min(sinks))
            out.append((box, tuple(sorted(ranks.items())), tuple(sorted(sinks)), extra_idx))
        return out

    def _missing(self, part: PartSpec, box: Box, sink_idx: int) -> MissingTensorError:
        return MissingTensorError(
            f"sink {sink_idx} needs {part.name!r} of shape {part.shape}, but no trainer rank holds its box at offset "
            f"{box.offset} of shape {box.shape}"
        )

    def _units(
        self,
        box: Box,
        mode: int,
        stage: int,
        elem_bytes: int,
        step: int,
        holders: tuple[Holder, ...],
        sinks: tuple[int, ...],
        follows: int = -1,
    ) -> list[Unit]:
        """One unit, or several where a descriptor could not describe it or where a choice of senders can be shared."""
        routes = self._routes(holders, sinks)
        capacity = self.bucket_bytes if any(len(r.candidates) > 1 for r in routes) else None
        out = []
        for part in _describable(box, mode, elem_bytes):
            for piece in _halved(part, elem_bytes, step, capacity):
                nbytes = piece.num_elements * elem_bytes
                out.append(Unit(stage, piece, mode, elem_bytes, nbytes, step, holders, routes, follows))
        return out

    def _routes(self, holders: tuple[Holder, ...], sinks: tuple[int, ...]) -> tuple[Route, ...]:
        """Nodes that hold the bytes are served from within; all others get them from one sender."""
        if len(holders) == 1:
            return (Route(holders, sinks),)
        source_node, sink_node = self.nodes.source_node, self.nodes.sink_node
        local: dict[int, list[Holder]] = {}
        for holder in holders:
            local.setdefault(source_node[holder[0]], []).append(holder)
        by_node: dict[int, list[int]] = {}
        for sink_idx in sinks:
            node = sink_node[sink_idx]
            by_node.setdefault(node if node in local else -1, []).append(sink_idx)
        return tuple(
            Route(holders if node < 0 else tuple(local[node]), tuple(group)) for node, group in sorted(by_node.items())
        )

    def _amax(self, units: list[Unit], claims: list[Claim]) -> list[tuple[int, int, Box]]:
        """The parts of shards whose scale blocks no single unit has as a whole."""
        shape, block = self.tensor.shape, self.recipe.block
        whole = [touched_cells(u.box, block) for u in units if u.mode == MODE_FUSED]
        cut = [touched_cells(u.box, block) for u in units if u.mode == MODE_SCALED]
        cut += [box for _, box in claims]
        cut = list(dict.fromkeys(cut))
        boxes = [*cut, *whole]
        found = partition(boxes, (1 << len(cut)) - 1)
        cells = joined([(box, 0) for box, mask in found if not mask >> len(cut)])
        areas = [weights_of_cells(box, shape, block) for box, _ in cells]
        held = list(self.holders)
        out: list[tuple[int, int, Box]] = []
        for area in areas:
            uncovered = [box for box, mask in partition([area, *held], 1) if mask == 1]
            if uncovered:
                sink_idx = min(s for claim in self.demand.claims for s, _ in claim)
                raise self._missing(self.demand.parts[0], uncovered[0], sink_idx)
            for box, holders in self.holders.items():
                common = box.intersect(area)
                if common is not None:
                    out += [(rank, shard_idx, common) for rank, shard_idx in holders]
        return sorted(out)

    def _scale_units(self, weights: list[Unit], part: PartSpec, claims: list[Claim]) -> list[Unit]:
        """Scales, cut so that each box follows one fused unit where the choice of its sender is open."""
        block = self.recipe.block
        held = [(owned_cells(box, block), holders) for box, holders in self.holders.items()]
        open_idx = [i for i, u in enumerate(weights) if u.mode == MODE_FUSED and len(u.holders) > 1]
        cells = [touched_cells(weights[i].box, block) for i in open_idx]
        out: list[Unit] = []
        elem_bytes = itemsize(part.dtype)
        for box, holders, sinks, extra_idx in self._blocks(part, claims, held, cells):
            follows = open_idx[extra_idx] if extra_idx >= 0 else -1
            out += self._units(box, MODE_COPY, 1, elem_bytes, 1, holders, sinks, follows)
        return out


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


def _halved(box: Box, elem_bytes: int, step: int, capacity: int | None) -> list[Box]:
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
