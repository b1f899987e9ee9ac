"""What the trainer holds, checked against itself, with equal lists of shards numbered once."""

from __future__ import annotations

from dataclasses import dataclass

from wsync.errors import DtypeMismatchError, ManifestError, ShapeMismatchError, UnknownTensorError
from wsync.spec.box import Box
from wsync.spec.manifest import SourceManifest, TensorSpec, check_shards, check_tensor

Shards = tuple[tuple[Box, ...], ...]
"""The boxes of one tensor on each trainer rank."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """A checked source manifest.

    Attributes:
        source: the manifest.
        target_of: name of each tensor -> index of the tensor that holds its memory.
        aliases: name of each tied tensor -> name of the tensor under which its bytes travel.
        shards_idx: for each tensor which of ``shards`` it has.
        shards: the distinct lists of shards.
    """

    source: SourceManifest
    target_of: dict[str, int]
    aliases: dict[str, str]
    shards_idx: list[int]
    shards: list[Shards]


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
    target_of = dict(index)
    for tensor in tensors:
        if tensor.alias_of is not None:
            target_of[tensor.name] = _target(tensor.name, tensors, index)
    return target_of


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


def check_source(source: SourceManifest) -> Holdings:
    """Check a source manifest against itself. Tensors that share their shards by identity are looked at once.

    Raises:
        ManifestError: no ranks, lists of unequal length, a tensor that cannot be, or aliases that cannot be.
        ShapeMismatchError: a shard that is not inside its tensor.
        DtypeMismatchError: a dtype that wsync does not move.
        UnknownTensorError: an alias of a tensor that does not exist.
    """
    if not source.ranks:
        raise ManifestError("a source needs at least 1 rank, got 0")
    if len(source.shards) != len(source.tensors):
        raise ManifestError(f"the source lists {len(source.tensors)} tensors, but shards of {len(source.shards)}")
    numbers = _Numbers()
    shards_idx: list[int] = []
    specs: set[tuple[object, ...]] = set()
    checked: set[tuple[tuple[int, ...], int]] = set()
    for tensor, shards in zip(source.tensors, source.shards, strict=True):
        spec = (tensor.shape, tensor.dtype, tensor.kind)
        if spec not in specs:
            check_tensor(tensor)
            specs.add(spec)
        idx = numbers.of(shards)
        if (tensor.shape, idx) not in checked:
            _check_shards(tensor, shards, len(source.ranks))
            checked.add((tensor.shape, idx))
        shards_idx.append(idx)
    target_of = resolve_aliases(source.tensors)
    aliases = {t.name: source.tensors[target_of[t.name]].name for t in source.tensors if t.alias_of is not None}
    return Holdings(source, target_of, aliases, shards_idx, numbers.values)


def _check_shards(tensor: TensorSpec, shards: Shards, num_ranks: int) -> None:
    if len(shards) != num_ranks:
        raise ManifestError(f"{tensor.name!r} has shards of {len(shards)} ranks, the source has {num_ranks}")
    for rank, boxes in enumerate(shards):
        check_shards(tensor, rank, boxes)


class _Numbers:
    """Numbers lists of shards: by identity first, so that a list of many ranks is hashed once and not per tensor."""

    def __init__(self) -> None:
        self.values: list[Shards] = []
        self._by_id: dict[int, int] = {}
        self._by_value: dict[Shards, int] = {}

    def of(self, shards: Shards) -> int:
        found = self._by_id.get(id(shards))
        if found is None:
            found = self._by_value.setdefault(shards, len(self.values))
            if found == len(self.values):
                self.values.append(shards)
            self._by_id[id(shards)] = found
        return found
