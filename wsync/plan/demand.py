"""What the sinks ask for, checked against what the trainer has. Nothing is planned before all of it is right."""

from __future__ import annotations

from dataclasses import dataclass, field

from wsync.errors import (
    DtypeMismatchError,
    ManifestError,
    RecipeError,
    ShapeMismatchError,
    UnknownTensorError,
)
from wsync.plan.grids import box_of_all_dims, group_of
from wsync.spec.box import Box
from wsync.spec.dtypes import same_bytes
from wsync.spec.manifest import (
    CopySpec,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
    check_shards,
    check_tensor,
)
from wsync.spec.recipes import PartSpec, get_recipe, recipe_parts

Claim = tuple[int, Box]
"""A sink index and a box that it needs."""


@dataclass(slots=True)
class Demand:
    """Everything that is asked for of one tensor in one recipe and scale group.

    Attributes:
        tensor_idx: into the source's tensors, an alias's target.
        recipe: how it is encoded.
        parts: the weight, then its tensors of scales, as an engine sees them.
        group: names of the tensors that share their amaxes; empty for a tensor by itself.
        claims: of each part, with as many dimensions as the tensor. Without any, the tensor only lends its amax.
    """

    tensor_idx: int
    recipe: str
    parts: tuple[PartSpec, ...]
    group: tuple[str, ...] = ()
    claims: tuple[list[Claim], ...] = field(default=())

    def __post_init__(self) -> None:
        self.claims = tuple([] for _ in self.parts)


def resolve_aliases(tensors: tuple[TensorSpec, ...]) -> dict[str, int]:
    """For each tensor's name the index of the tensor that holds its memory.

    Raises:
        UnknownTensorError: an alias of a tensor that does not exist.
        ShapeMismatchError, DtypeMismatchError: an alias that differs from its target.
        ManifestError: a name twice, or aliases in a circle.
    """
    index: dict[str, int] = {}
    for i, tensor in enumerate(tensors):
        if index.setdefault(tensor.name, i) != i:
            raise ManifestError(f"tensor {tensor.name!r} is in the source twice, at {index[tensor.name]} and at {i}")
    return {name: _target(name, tensors, index) for name in index}


def _target(name: str, tensors: tuple[TensorSpec, ...], index: dict[str, int]) -> int:
    tensor = tensors[index[name]]
    seen = {name}
    while tensor.alias_of is not None:
        target = index.get(tensor.alias_of)
        if target is None:
            raise UnknownTensorError(f"tensor {tensor.name!r} is an alias of {tensor.alias_of!r}, which is not there")
        if tensor.alias_of in seen:
            raise ManifestError(f"tensor {name!r} is an alias of itself by way of {tensor.name!r}")
        other = tensors[target]
        if other.shape != tensor.shape:
            raise ShapeMismatchError(
                f"{tensor.name!r} has shape {tensor.shape}, but {other.name!r}, whose alias it is, has {other.shape}"
            )
        if other.dtype != tensor.dtype:
            raise DtypeMismatchError(
                f"{tensor.name!r} is {tensor.dtype}, but {other.name!r}, whose alias it is, is {other.dtype}"
            )
        seen.add(other.name)
        tensor = other
    return index[tensor.name]


def check_source(source: SourceManifest) -> None:
    """Check a source manifest against itself.

    Raises:
        ManifestError: no ranks, lists of unequal length, or a tensor that cannot be.
        ShapeMismatchError: a shard that is not inside its tensor.
        DtypeMismatchError: a dtype that wsync does not move.
    """
    if not source.ranks:
        raise ManifestError("a source needs at least 1 rank, got 0")
    if len(source.shards) != len(source.tensors):
        raise ManifestError(f"the source lists {len(source.tensors)} tensors, but shards of {len(source.shards)}")
    checked: set[tuple[object, object]] = set()
    for tensor, shards in zip(source.tensors, source.shards, strict=True):
        check_tensor(tensor)
        if (tensor.shape, shards) in checked:
            continue
        if len(shards) != len(source.ranks):
            raise ManifestError(
                f"{tensor.name!r} has shards of {len(shards)} ranks, the source has {len(source.ranks)}"
            )
        for rank, boxes in enumerate(shards):
            check_shards(tensor, rank, boxes)
        checked.add((tensor.shape, shards))


DemandKey = tuple[int, str, tuple[str, ...]]
"""Tensor, recipe and scale group."""


def collect_demands(source: SourceManifest, sink: SinkManifest) -> list[Demand]:
    """Check every copy of every sink and gather them by tensor, recipe and scale group, in this order.

    Raises:
        ManifestError: or one of its leaves, or `RecipeError`; each names tensor, replica, rank and both values.
    """
    if not sink.ranks:
        raise ManifestError("a plan needs at least 1 engine rank, got 0")
    demands = _Demands(source)
    for sink_idx, rank in enumerate(sink.ranks):
        _Rank(sink_idx, rank, demands).collect()
    demands.add_lenders()
    return [found for _, found in sorted(demands.by_key.items()) if any(found.claims) or found.group]


class _Demands:
    """What is asked for so far, and the source that it is asked of."""

    def __init__(self, source: SourceManifest) -> None:
        self.tensors = source.tensors
        self.target_of = resolve_aliases(source.tensors)
        self.aliases = {name: source.tensors[idx].name for name, idx in self.target_of.items()}
        self.by_key: dict[DemandKey, Demand] = {}

    def of(self, key: DemandKey, where: str) -> Demand:
        """The demand of that key, made if it is the first of its kind."""
        demand = self.by_key.get(key)
        if demand is None:
            tensor_idx, recipe, group = key
            tensor = self.tensors[tensor_idx]
            try:
                parts = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
            except RecipeError as e:
                raise RecipeError(f"{where}: {e.message}", hint=e.hint) from e
            demand = self.by_key[key] = Demand(tensor_idx, recipe, parts, group)
        return demand

    def add_lenders(self) -> None:
        """The tensors of a group that nobody takes lend it their amaxes all the same."""
        wanted = {(d.recipe, d.group) for d in self.by_key.values() if d.group and any(d.claims)}
        for key in [k for k in self.by_key if k[2] and k[1:] not in wanted]:
            del self.by_key[key]
        for recipe, group in sorted(wanted):
            for name in group:
                self.of((self.target_of[name], recipe, group), f"the scale group {', '.join(group)}")


class _Rank:
    """One engine rank's copies and scale groups."""

    def __init__(self, sink_idx: int, rank: SinkRankManifest, demands: _Demands) -> None:
        self.sink_idx = sink_idx
        self.rank = rank
        self.demands = demands
        self.where = f"rank {rank.rank} of replica {rank.replica!r}"
        self.groups = self._groups()

    def collect(self) -> None:
        here: dict[tuple[str, str], tuple[Demand, int]] = {}
        for copy in self.rank.copies:
            found = here.get((copy.tensor, copy.role))
            if found is None:
                found = here[(copy.tensor, copy.role)] = self._find_part(copy)
            demand, part_idx = found
            _check_copy(copy, demand.parts[part_idx], self.rank.storages, self.where)
            if copy.role == "weight":
                _check_columns(copy.box, demand, self.where)
            if copy.box.num_elements:
                num_dims = len(self.demands.tensors[demand.tensor_idx].shape)
                demand.claims[part_idx].append((self.sink_idx, box_of_all_dims(copy.box, num_dims)))

    def _target(self, name: str) -> int:
        tensor_idx = self.demands.target_of.get(name)
        if tensor_idx is None:
            raise UnknownTensorError(
                f"{self.where} needs tensor {name!r}, which is not among the source's {len(self.demands.tensors)}"
            )
        return tensor_idx

    def _find_part(self, copy: CopySpec) -> tuple[Demand, int]:
        tensor_idx = self._target(copy.tensor)
        recipe = self.rank.recipes.get(copy.tensor)
        if recipe is None:
            raise ManifestError(f"{self.where} copies tensor {copy.tensor!r}, but gives no recipe for it")
        demand = self.demands.of((tensor_idx, recipe, self.groups.get(copy.tensor, ())), self.where)
        for part_idx, part in enumerate(demand.parts):
            if part.role == copy.role:
                return demand, part_idx
        roles = ", ".join(p.role for p in demand.parts)
        raise RecipeError(
            f"{self.where} needs part {copy.role!r} of {copy.tensor!r}, but recipe {recipe!r} writes {roles}"
        )

    def _groups(self) -> dict[str, tuple[str, ...]]:
        """The scale group of each tensor that is in one."""
        found: dict[str, tuple[str, ...]] = {}
        said: dict[str, tuple[str, ...]] = {}
        for names in self.rank.scale_groups:
            for name in names:
                self._target(name)
                if said.setdefault(name, names) != names:
                    raise ManifestError(
                        f"{self.where} has {name!r} in two scale groups: {list(said[name])} and {list(names)}"
                    )
            self._check_group(names)
            found.update(dict.fromkeys(names, group_of(names, self.demands.aliases)))
        return found

    def _check_group(self, names: tuple[str, ...]) -> None:
        """Refuse a group whose tensors could not have one amax."""
        recipes = {name: self.rank.recipes[name] for name in names if name in self.rank.recipes}
        if not recipes:
            return
        first, recipe = next(iter(recipes.items()))
        for name, other in recipes.items():
            if other != recipe:
                raise ManifestError(
                    f"{self.where} has {first!r} in recipe {recipe!r} and {name!r} in recipe {other!r}, but both in "
                    f"one scale group"
                )
        try:
            needs_amax = get_recipe(recipe).needs_amax
        except RecipeError as e:
            raise RecipeError(f"{self.where}: {e.message}", hint=e.hint) from e
        if not needs_amax:
            raise ManifestError(
                f"{self.where} has {first!r} in a scale group, but recipe {recipe!r} has no scale of the whole tensor"
            )
        shapes = {name: self.demands.tensors[self._target(name)].shape for name in names}
        for name, shape in shapes.items():
            if shape[:-2] != shapes[first][:-2]:
                raise ShapeMismatchError(
                    f"{self.where} has {first!r} of shape {shapes[first]} and {name!r} of shape {shape} in one scale "
                    f"group: all dimensions but the last two must be equal"
                )


def _check_columns(box: Box, demand: Demand, where: str) -> None:
    recipe = get_recipe(demand.recipe)
    if recipe.group == 1 or not box.num_elements:
        return
    for col in (box.offset[-1] * recipe.packed, box.end[-1] * recipe.packed):
        check_column(col, demand.parts[0].name, demand.recipe, f"the box that {where} needs")


def check_column(col: int, name: str, recipe: str, what: str) -> None:
    """Refuse an edge inside a group of columns that a recipe encodes together.

    Raises:
        RecipeError: with the tensor, the column and the group; ``what`` says whose edge it is.
    """
    group = get_recipe(recipe).group
    if col % group:
        raise RecipeError(
            f"recipe {recipe!r} encodes {group} columns of {name!r} together, but an edge of {what} is at column "
            f"{col}, inside the group of columns {col // group * group} to {col // group * group + group - 1}",
            hint="cut columns at multiples of the group, or choose a recipe whose amaxes are exchanged",
        )


def _check_copy(copy: CopySpec, part: PartSpec, storages: tuple[StorageSpec, ...], where: str) -> None:
    box, shape = copy.box, part.shape
    ndim = len(shape)
    if len(box.shape) != ndim or len(box.offset) != ndim or len(copy.dst_strides) != ndim:
        raise ShapeMismatchError(
            f"{where} copies box (offset {box.offset}, shape {box.shape}) of {part.name!r} with strides "
            f"{copy.dst_strides}; the source has shape {shape}"
        )
    low = high = copy.dst_offset
    for offset, extent, limit, stride in zip(box.offset, box.shape, shape, copy.dst_strides, strict=True):
        if offset < 0 or extent < 0 or offset + extent > limit:
            raise ShapeMismatchError(
                f"{where} needs box (offset {box.offset}, shape {box.shape}) of {part.name!r}; the source has shape "
                f"{shape}"
            )
        if extent > 1:
            if stride > 0:
                high += (extent - 1) * stride
            elif stride < 0:
                low += (extent - 1) * stride
            else:
                raise ManifestError(f"{where} writes {extent} elements of {part.name!r} to one address (stride 0)")
    if not 0 <= copy.storage_idx < len(storages):
        raise ManifestError(
            f"{where} copies {part.name!r} to storage {copy.storage_idx}, but lists {len(storages)} storages"
        )
    storage = storages[copy.storage_idx]
    if not same_bytes(storage.dtype, part.dtype):
        raise DtypeMismatchError(
            f"{where} keeps {part.name!r} as {storage.dtype} (storage {storage.name!r}), the wire carries {part.dtype}",
            hint="declare a recipe for the tensor that writes the storage's dtype",
        )
    if (low < 0 or high >= storage.num_elements) and box.num_elements:
        raise ManifestError(
            f"{where} copies {part.name!r} to elements {low} to {high} of storage {storage.name!r}, which has "
            f"{storage.num_elements}"
        )
