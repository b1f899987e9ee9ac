"""What the sinks ask for, checked against what the trainer has. Nothing is planned before all of it is right.

Everything is done once per class of engine ranks, and what does not depend on a tensor's name once per shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

import msgspec

from wsync.errors import (
    DtypeMismatchError,
    ManifestError,
    RecipeError,
    ShapeMismatchError,
    UnknownTensorError,
)
from wsync.plan.grids import box_of_all_dims, group_of
from wsync.plan.holdings import Holdings
from wsync.spec.box import Box
from wsync.spec.dtypes import same_bytes
from wsync.spec.manifest import CopySpec, SinkRankManifest, StorageSpec, TensorSpec
from wsync.spec.recipes import PartSpec, Recipe, get_recipe, recipe_parts

Claim = tuple[int, int, int]
"""A part, the number of a class of engine ranks, and that of a box of the part which it needs."""

_Place = tuple[int, int, int]
"""Of a copy's box and strides: number of the box (-1: empty), the lowest and the highest element that is written,
counted from the copy's own offset."""


@dataclass(slots=True, eq=False)
class Encoding:
    """How tensors of one shape and dtype are encoded in one recipe.

    Attributes:
        idx: number of the encoding.
        shape, dtype: of the tensors.
        recipe: how.
        parts: the weight, then its tensors of scales, as an engine sees them; their names are suffixes.
        part_of: role -> part.
        places: of a part, a box and strides what is known about them.
    """

    idx: int
    shape: tuple[int, ...]
    dtype: str
    recipe: Recipe
    parts: tuple[PartSpec, ...]
    part_of: dict[str, int]
    places: dict[tuple[int, Box, tuple[int, ...]], _Place] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Demand:
    """Everything that is asked for of one tensor in one recipe and scale group.

    Attributes:
        tensor_idx: into the source's tensors, an alias's target.
        encoding: how it is encoded.
        group: names of the tensors that share their amaxes; empty for a tensor by itself.
        claims: in order of class; boxes have as many dimensions as the tensor. Without any, it only lends its amax.
    """

    tensor_idx: int
    encoding: Encoding
    group: tuple[str, ...]
    claims: list[Claim] = field(default_factory=list)


DemandKey = tuple[int, str, tuple[str, ...]]
"""Tensor, recipe and scale group."""


class Boxes:
    """Numbers boxes, so that claims compare as integers."""

    def __init__(self) -> None:
        self.values: list[Box] = []
        self._numbers: dict[Box, int] = {}

    def number(self, box: Box) -> int:
        """The number of a box."""
        found = self._numbers.setdefault(box, len(self.values))
        if found == len(self.values):
            self.values.append(box)
        return found


class Encodings:
    """The encodings that were asked for so far. They know nothing of ranks and serve every plan of one source."""

    def __init__(self, boxes: Boxes) -> None:
        self.boxes = boxes
        self._by_key: dict[tuple[tuple[int, ...], str, str], Encoding] = {}

    def of(self, tensor: TensorSpec, recipe: str, where: str) -> Encoding:
        """The encoding of a tensor.

        Raises:
            RecipeError: the recipe is unknown or cannot encode the tensor; ``where`` says who wants it.
        """
        key = (tensor.shape, tensor.dtype, recipe)
        found = self._by_key.get(key)
        if found is None:
            try:
                parts = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
            except RecipeError as e:
                raise RecipeError(f"{where}: {e.message}", hint=e.hint) from e
            facts = get_recipe(recipe)
            parts = tuple(msgspec.structs.replace(p, name=facts.suffix(p.role)) for p in parts)
            part_of = {p.role: i for i, p in enumerate(parts)}
            found = Encoding(len(self._by_key), tensor.shape, tensor.dtype, facts, parts, part_of)
            self._by_key[key] = found
        return found


def collect_demands(
    holdings: Holdings, ranks: Iterable[tuple[int, SinkRankManifest]], encodings: Encodings
) -> list[Demand]:
    """Check every copy of every class of engine ranks and gather them by tensor, recipe and scale group, in this order.

    Args:
        holdings: what the trainer has.
        ranks: for each class of engine ranks its number and one of its ranks.
        encodings: that are known, and are added to.

    Raises:
        ManifestError: or one of its leaves, or `RecipeError`; each names tensor, replica, rank and both values.
    """
    demands = _Demands(holdings, encodings)
    for number, rank in ranks:
        _Rank(number, rank, demands).collect()
    demands.add_lenders()
    return [found for _, found in sorted(demands.by_key.items()) if found.claims or found.group]


class _Demands:
    """What is asked for so far, and the source that it is asked of."""

    def __init__(self, holdings: Holdings, encodings: Encodings) -> None:
        self.tensors = holdings.source.tensors
        self.target_of = holdings.target_of
        self.aliases = holdings.aliases
        self.encodings = encodings
        self.by_key: dict[DemandKey, Demand] = {}

    def of(self, key: DemandKey, where: str) -> Demand:
        """The demand of that key, made if it is the first of its kind."""
        demand = self.by_key.get(key)
        if demand is None:
            tensor_idx, recipe, group = key
            encoding = self.encodings.of(self.tensors[tensor_idx], recipe, where)
            demand = self.by_key[key] = Demand(tensor_idx, encoding, group)
        return demand

    def add_lenders(self) -> None:
        """The tensors of a group that nobody takes lend it their amaxes all the same."""
        wanted = {(key[1], key[2]) for key, d in self.by_key.items() if key[2] and d.claims}
        for key in [k for k in self.by_key if k[2] and k[1:] not in wanted]:
            del self.by_key[key]
        for recipe, group in sorted(wanted):
            for name in group:
                self.of((self.target_of[name], recipe, group), f"the scale group {', '.join(group)}")


class _Rank:
    """The copies and scale groups of one class of engine ranks, in the words of its first rank."""

    def __init__(self, number: int, rank: SinkRankManifest, demands: _Demands) -> None:
        self.number = number
        self.rank = rank
        self.demands = demands
        self.where = f"rank {rank.rank} of replica {rank.replica!r}"
        self.groups = self._groups()

    def collect(self) -> None:
        number, storages = self.number, self.rank.storages
        taken: set[tuple[str, str]] = set()
        name: str | None = None
        for copy in self.rank.copies:
            if copy.tensor != name:
                name = copy.tensor
                demand = self._demand(name)
                encoding = demand.encoding
            part_idx = encoding.part_of.get(copy.role)
            if part_idx is None:
                raise self._no_part(copy, encoding)
            place = encoding.places.get((part_idx, copy.box, copy.dst_strides))
            if place is None:
                place = self._place(copy, encoding, part_idx)
            box_idx, low, high = place
            part = encoding.parts[part_idx]
            if not 0 <= copy.storage_idx < len(storages):
                raise ManifestError(
                    f"{self.where} copies {name + part.name!r} to storage {copy.storage_idx}, but lists "
                    f"{len(storages)} storages"
                )
            storage = storages[copy.storage_idx]
            if (storage.dtype, part.dtype) not in taken:
                self._check_dtype(copy, part, storage)
                taken.add((storage.dtype, part.dtype))
            if box_idx >= 0:
                if copy.dst_offset + low < 0 or copy.dst_offset + high >= storage.num_elements:
                    raise ManifestError(
                        f"{self.where} copies {name + part.name!r} to elements {copy.dst_offset + low} to "
                        f"{copy.dst_offset + high} of storage {storage.name!r}, which has {storage.num_elements}"
                    )
                demand.claims.append((part_idx, number, box_idx))

    def _place(self, copy: CopySpec, encoding: Encoding, part_idx: int) -> _Place:
        part = encoding.parts[part_idx]
        low, high = _written(copy, part, self.where)
        key = (part_idx, copy.box, copy.dst_strides)
        if not copy.box.num_elements:
            return encoding.places.setdefault(key, (-1, low, high))
        if copy.role == "weight" and encoding.recipe.group > 1:
            for col in (copy.box.offset[-1], copy.box.end[-1]):
                what = f"the box that {self.where} needs"
                check_column(col * encoding.recipe.packed, copy.tensor, encoding.recipe.name, what)
        box_idx = self.demands.encodings.boxes.number(box_of_all_dims(copy.box, len(encoding.shape)))
        return encoding.places.setdefault(key, (box_idx, low, high))

    def _check_dtype(self, copy: CopySpec, part: PartSpec, storage: StorageSpec) -> None:
        if not same_bytes(storage.dtype, part.dtype):
            raise DtypeMismatchError(
                f"{self.where} keeps {copy.tensor + part.name!r} as {storage.dtype} (storage {storage.name!r}), the "
                f"wire carries {part.dtype}",
                hint="declare a recipe for the tensor that writes the storage's dtype",
            )

    def _target(self, name: str) -> int:
        tensor_idx = self.demands.target_of.get(name)
        if tensor_idx is None:
            raise UnknownTensorError(
                f"{self.where} needs tensor {name!r}, which is not among the source's {len(self.demands.tensors)}",
                hint=_hint_for(name, self.demands.target_of),
            )
        return tensor_idx

    def _demand(self, name: str) -> Demand:
        tensor_idx = self._target(name)
        recipe = self.rank.recipes.get(name)
        if recipe is None:
            raise ManifestError(f"{self.where} copies tensor {name!r}, but gives no recipe for it")
        return self.demands.of((tensor_idx, recipe, self.groups.get(name, ())), self.where)

    def _no_part(self, copy: CopySpec, encoding: Encoding) -> RecipeError:
        roles = ", ".join(p.role for p in encoding.parts)
        return RecipeError(
            f"{self.where} needs part {copy.role!r} of {copy.tensor!r}, but recipe {encoding.recipe.name!r} writes "
            f"{roles}"
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


def _hint_for(name: str, known: Iterable[str]) -> str:
    """The names that look most like an unknown one."""
    # Most unknown names differ from a known one in a prefix, which leaves their ends alike: look at few, and closely.
    leaf = name.rsplit(".", 2)[-2:]
    alike = [other for other in known if other.rsplit(".", 2)[-2:] == leaf][:200]
    close = get_close_matches(name, alike or list(known)[:2000], n=1)
    both = "record or describe the engine against the trainer's own names"
    return f"the source has {close[0]!r}; {both}" if close else both


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


def _written(copy: CopySpec, part: PartSpec, where: str) -> tuple[int, int]:
    """The lowest and the highest element that a copy writes, counted from its offset."""
    box, shape, name = copy.box, part.shape, copy.tensor + part.name
    ndim = len(shape)
    if len(box.shape) != ndim or len(box.offset) != ndim or len(copy.dst_strides) != ndim:
        raise ShapeMismatchError(
            f"{where} copies box (offset {box.offset}, shape {box.shape}) of {name!r} with strides "
            f"{copy.dst_strides}; the source has shape {shape}"
        )
    low = high = 0
    for offset, extent, limit, stride in zip(box.offset, box.shape, shape, copy.dst_strides, strict=True):
        if offset < 0 or extent < 0 or offset + extent > limit:
            raise ShapeMismatchError(
                f"{where} needs box (offset {box.offset}, shape {box.shape}) of {name!r}; the source has shape {shape}"
            )
        if extent > 1:
            if stride > 0:
                high += (extent - 1) * stride
            elif stride < 0:
                low += (extent - 1) * stride
            else:
                raise ManifestError(f"{where} writes {extent} elements of {name!r} to one address (stride 0)")
    return low, high
