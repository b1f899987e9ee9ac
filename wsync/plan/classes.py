"""Tensors by class, and where the amaxes of each class lie in the exchanged vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wsync.plan.blocks import Blocks, Cutting, intersect
from wsync.plan.delta_size import Densities
from wsync.plan.demand import Claim, Demand, Encodings
from wsync.plan.grids import all_dims
from wsync.plan.holdings import Holdings
from wsync.plan.plans import PlanClass, PlanPart, PlanUnit, ScaleGroup
from wsync.spec.dtypes import itemsize

_FINE_MEMBERS = 64
"""Classes of as many tensors are shared out by whole units of whole tensors: no unit needs to be cut for that."""

_Key = tuple[int, int, bool, "float | None", tuple[tuple[Claim, ...], ...]]
"""Encoding, shards, whether in scale groups, density, claims of each part."""


@dataclass(slots=True)
class TensorClass:
    """Tensors that share their intersection.

    Attributes:
        blocks: the intersection.
        members: in order of tensor.
        density: share of their elements that changes from one version to the next; None: they travel whole.
    """

    blocks: Blocks
    members: list[Demand]
    density: float | None

    def wire_bytes(self, nbytes: int, part: int) -> int:
        """What is expected to travel of ``nbytes`` of a part."""
        if self.density is None:
            return nbytes
        return Densities.expected_bytes(nbytes, itemsize(self.members[0].encoding.parts[part].dtype), self.density)


@dataclass
class Classes:
    """Finds classes, and keeps the intersections: they hold for every plan of one source."""

    holdings: Holdings
    encodings: Encodings
    densities: Densities
    _blocks: dict[tuple[_Key, Cutting], Blocks] = field(default_factory=dict)

    def find(
        self, demands: list[Demand], bucket_bytes: int, first_sink: Callable[[int], int]
    ) -> list[TensorClass]:
        """Group demands by class, in order of first member, and intersect each class once.

        Args:
            demands: of all tensors.
            bucket_bytes: size of a bucket.
            first_sink: index of a rank of the classes of a mask, for messages.

        Raises:
            MissingTensorError, RecipeError, ManifestError, ConfigError: see `intersect`.
        """
        tensors, shards_idx = self.holdings.source.tensors, self.holdings.shards_idx
        density_of = self.densities.of
        members: dict[_Key, list[Demand]] = {}
        for demand in demands:
            idx = demand.tensor_idx
            claims = tuple(map(tuple, demand.claims))
            key = (demand.encoding.idx, shards_idx[idx], bool(demand.group), density_of(tensors[idx].name), claims)
            found = members.get(key)
            if found is None:
                members[key] = [demand]
            else:
                found.append(demand)
        found_classes = []
        for key, found in members.items():
            cutting = Cutting(bucket_bytes, len(found) < _FINE_MEMBERS)
            found_classes.append(TensorClass(self._intersected(key, found[0], cutting, first_sink), found, key[3]))
        return found_classes

    def _intersected(
        self, key: _Key, member: Demand, cutting: Cutting, first_sink: Callable[[int], int]
    ) -> Blocks:
        found = self._blocks.get((key, cutting))
        if found is None:
            boxes = self.encodings.boxes.values
            claims = tuple([(number, boxes[box_idx]) for number, box_idx in of_part] for of_part in key[4])
            name = self.holdings.source.tensors[member.tensor_idx].name
            shards = self.holdings.shards[key[1]]
            found = intersect(member, name, shards, claims, cutting, first_sink)
            self._blocks[(key, cutting)] = found
        return found


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
    for cls in classes:
        blocks, encoding = cls.blocks, cls.members[0].encoding
        groups: tuple[int, ...] = ()
        first = elements
        if cls.members[0].group:
            groups = tuple(
                group_idx.setdefault((encoding.recipe.name, m.group), len(group_idx)) for m in cls.members
            )
            firsts += [-1] * (len(group_idx) - len(firsts))
            for idx in groups if blocks.grid_elements else ():
                if firsts[idx] < 0:
                    firsts[idx] = elements
                    elements += blocks.grid_elements
        else:
            elements += len(cls.members) * blocks.grid_elements
        num_dims = len(encoding.shape)
        parts = tuple(PlanPart(p.role, p.name, p.dtype, all_dims(p.shape, num_dims, 1)) for p in encoding.parts)
        units = tuple(
            PlanUnit(u.part, u.box, u.mode, u.step, u.nbytes, cls.wire_bytes(u.nbytes, u.part)) for u in blocks.units
        )
        members = tuple(m.tensor_idx for m in cls.members)
        recipe = encoding.recipe.name
        out.append(PlanClass(recipe, parts, units, members, groups, blocks.amax, blocks.grid_elements, first))
    scale_groups = tuple(
        ScaleGroup(tuple(target_of[name] for name in names), max(first, 0))
        for (_, names), first in zip(group_idx, firsts, strict=True)
    )
    return tuple(out), scale_groups, elements
