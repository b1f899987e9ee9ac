"""Tensors by class, and where the amaxes of each class lie in the exchanged vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wsync.plan.blocks import Blocks, Cutting, NamedClaim, Unit, intersect
from wsync.plan.delta_size import Densities, expected_bytes
from wsync.plan.demand import Claim, Demand, Encodings
from wsync.plan.geometry import bits
from wsync.plan.grids import all_dims
from wsync.plan.holdings import Holdings
from wsync.plan.plans import PlanClass, PlanPart, PlanUnit, ScaleGroup
from wsync.plan.rank_classes import mask_of
from wsync.spec.dtypes import itemsize

_FINE_MEMBERS = 64
"""Classes of as many tensors are shared out by whole units of whole tensors: no unit needs to be cut for that."""

ClassKey = tuple[int, int, bool, "float | None", tuple[Claim, ...]]
"""Encoding, shards, whether in scale groups, density, claims."""


@dataclass(slots=True)
class TensorClass:
    """Tensors that share their intersection.

    Attributes:
        blocks: the intersection, whose masks count the classes of engine ranks of ``numbers``.
        numbers: of the classes of engine ranks, in the order in which the blocks count them.
        members: in order of tensor.
        density: share of their elements that changes from one version to the next; None: they travel whole.
    """

    blocks: Blocks
    numbers: tuple[int, ...]
    members: list[Demand]
    density: float | None
    _masks: dict[int, int] = field(default_factory=dict)

    def needers(self, unit: Unit) -> int:
        """Mask of the classes of engine ranks that need a unit."""
        found = self._masks.get(unit.needers)
        if found is None:
            found = self._masks[unit.needers] = mask_of(self.numbers[i] for i in bits(unit.needers))
        return found

    def wire_bytes(self, unit: Unit) -> int:
        """What is expected to travel of one member's piece."""
        if self.density is None:
            return unit.nbytes
        dtype = self.members[0].encoding.parts[unit.part].dtype
        return expected_bytes(unit.nbytes, itemsize(dtype), self.density)


@dataclass
class Classes:
    """Finds classes, and keeps the intersections: they hold for every plan of one source.

    Classes that differ only in which engine ranks need what, as experts do, have one intersection.
    """

    holdings: Holdings
    encodings: Encodings
    densities: Densities
    _blocks: dict[tuple[int, int, bool, tuple[Claim, ...], Cutting], Blocks] = field(default_factory=dict)

    def group(self, demands: list[Demand]) -> dict[ClassKey, list[Demand]]:
        """The members of each class, in order of first member."""
        tensors, shards_idx = self.holdings.source.tensors, self.holdings.shards_idx
        density_of = self.densities.of
        members: dict[ClassKey, list[Demand]] = {}
        for demand in demands:
            idx = demand.tensor_idx
            density = density_of(tensors[idx].name)
            key = (demand.encoding.idx, shards_idx[idx], bool(demand.group), density, tuple(demand.claims))
            found = members.get(key)
            if found is None:
                members[key] = [demand]
            else:
                found.append(demand)
        return members

    def intersect(
        self, members: dict[ClassKey, list[Demand]], bucket_bytes: int, first_sink: Callable[[int], int]
    ) -> list[TensorClass]:
        """Intersect each class once.

        Args:
            members: of each class.
            bucket_bytes: size of a bucket.
            first_sink: index of a rank of the classes of a mask, for messages.

        Raises:
            MissingTensorError, RecipeError, ManifestError, ConfigError: see `intersect`.
        """
        out = []
        for (encoding_idx, shards_idx, is_grouped, density, claims), found in members.items():
            local: dict[int, int] = {}
            own = tuple((part, local.setdefault(number, len(local)), box_idx) for part, number, box_idx in claims)
            cutting = Cutting(bucket_bytes, len(found) < _FINE_MEMBERS)
            key = (encoding_idx, shards_idx, is_grouped, own, cutting)
            numbers = tuple(local)
            blocks = self._blocks.get(key)
            if blocks is None:
                blocks = self._blocks[key] = self._new_blocks(found[0], own, cutting, numbers, first_sink)
            out.append(TensorClass(blocks, numbers, found, density))
        return out

    def _new_blocks(
        self,
        member: Demand,
        claims: tuple[Claim, ...],
        cutting: Cutting,
        numbers: tuple[int, ...],
        first_sink: Callable[[int], int],
    ) -> Blocks:
        boxes = self.encodings.boxes.values
        of_part: tuple[list[NamedClaim], ...] = tuple([] for _ in member.encoding.parts)
        for part, number, box_idx in claims:
            of_part[part].append((number, boxes[box_idx]))
        name = self.holdings.source.tensors[member.tensor_idx].name
        shards = self.holdings.shards[self.holdings.shards_idx[member.tensor_idx]]

        def first(mask: int) -> int:
            return first_sink(mask_of(numbers[i] for i in bits(mask)))

        return intersect(member, name, shards, of_part, cutting, first)


def plan_classes(
    classes: list[TensorClass], target_of: dict[str, int]
) -> tuple[tuple[PlanClass, ...], tuple[ScaleGroup, ...], int]:
    """The classes as a plan has them, the scale groups, and the elements of the exchanged vector.

    Args:
        classes: that were found.
        target_of: name of a tensor -> its index.
    """
    group_idx: dict[tuple[str, tuple[str, ...]], int] = {}
    firsts: list[int] = []
    elements = 0
    out = []
    units_of: dict[tuple[int, float | None], tuple[PlanUnit, ...]] = {}
    for cls in classes:
        blocks, encoding = cls.blocks, cls.members[0].encoding
        groups: tuple[int, ...] = ()
        first = elements
        if cls.members[0].group:
            groups = tuple(group_idx.setdefault((encoding.recipe.name, m.group), len(group_idx)) for m in cls.members)
            firsts += [-1] * (len(group_idx) - len(firsts))
            for idx in groups if blocks.grid_elements else ():
                if firsts[idx] < 0:
                    firsts[idx] = elements
                    elements += blocks.grid_elements
        else:
            elements += len(cls.members) * blocks.grid_elements
        num_dims = len(encoding.shape)
        parts = tuple(PlanPart(p.role, p.name, p.dtype, all_dims(p.shape, num_dims, 1)) for p in encoding.parts)
        key = (id(blocks), cls.density)
        units = units_of.get(key)
        if units is None:
            units = units_of[key] = tuple(
                PlanUnit(u.part, u.box, u.mode, u.step, u.nbytes, cls.wire_bytes(u)) for u in blocks.units
            )
        members = tuple(m.tensor_idx for m in cls.members)
        recipe = encoding.recipe.name
        out.append(PlanClass(recipe, parts, units, members, groups, blocks.amax, blocks.grid_elements, first))
    scale_groups = tuple(
        ScaleGroup(tuple(target_of[name] for name in names), max(first, 0))
        for (_, names), first in zip(group_idx, firsts, strict=True)
    )
    return tuple(out), scale_groups, elements
