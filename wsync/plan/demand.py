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
from wsync.spec.recipes import PartSpec, recipe_parts

Claim = tuple[int, Box]
"""A sink index and a box that it needs."""


@dataclass(slots=True)
class Demand:
    """Everything that is asked for of one tensor in one recipe.

    Attributes:
        tensor_idx: into the source's tensors, an alias's target.
        recipe: how it is encoded.
        parts: weight, and scale where the recipe has one.
        claims: of each part.
    """

    tensor_idx: int
    recipe: str
    parts: tuple[PartSpec, ...]
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


def collect_demands(source: SourceManifest, sink: SinkManifest) -> list[Demand]:
    """Check every copy of every sink and gather them by tensor and recipe, in order of tensor, then recipe.

    Raises:
        ManifestError: or one of its leaves, or `RecipeError`; each names tensor, replica, rank and both values.
    """
    if not sink.ranks:
        raise ManifestError("a plan needs at least 1 engine rank, got 0")
    target_of = resolve_aliases(source.tensors)
    demands: dict[tuple[int, str], Demand] = {}
    for sink_idx, rank in enumerate(sink.ranks):
        _collect_rank(sink_idx, rank, source.tensors, target_of, demands)
    return [demands[key] for key in sorted(demands)]


def _collect_rank(
    sink_idx: int,
    rank: SinkRankManifest,
    tensors: tuple[TensorSpec, ...],
    target_of: dict[str, int],
    demands: dict[tuple[int, str], Demand],
) -> None:
    where = f"rank {rank.rank} of replica {rank.replica!r}"
    here: dict[tuple[str, str], tuple[PartSpec, list[Claim]]] = {}
    for copy in rank.copies:
        found = here.get((copy.tensor, copy.role))
        if found is None:
            found = _find_part(copy, rank, where, tensors, target_of, demands)
            here[(copy.tensor, copy.role)] = found
        part, claims = found
        _check_copy(copy, part, rank.storages, where)
        if copy.box.num_elements:
            claims.append((sink_idx, copy.box))


def _find_part(
    copy: CopySpec,
    rank: SinkRankManifest,
    where: str,
    tensors: tuple[TensorSpec, ...],
    target_of: dict[str, int],
    demands: dict[tuple[int, str], Demand],
) -> tuple[PartSpec, list[Claim]]:
    tensor_idx = target_of.get(copy.tensor)
    if tensor_idx is None:
        raise UnknownTensorError(
            f"{where} needs tensor {copy.tensor!r}, which is not among the source's {len(tensors)}"
        )
    recipe = rank.recipes.get(copy.tensor)
    if recipe is None:
        raise ManifestError(f"{where} copies tensor {copy.tensor!r}, but gives no recipe for it")
    demand = demands.get((tensor_idx, recipe))
    if demand is None:
        tensor = tensors[tensor_idx]
        try:
            parts = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
        except RecipeError as e:
            raise RecipeError(f"{where}: {e.message}", hint=e.hint) from e
        demand = demands[(tensor_idx, recipe)] = Demand(tensor_idx, recipe, parts)
    for part, claims in zip(demand.parts, demand.claims, strict=True):
        if part.role == copy.role:
            return part, claims
    roles = ", ".join(p.role for p in demand.parts)
    raise RecipeError(f"{where} needs part {copy.role!r} of {copy.tensor!r}, but recipe {recipe!r} writes {roles}")


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
