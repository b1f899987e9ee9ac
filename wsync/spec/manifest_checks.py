"""What a loaded manifest must be before anything is done with it. Linear in the distinct things that it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from wsync.errors import ManifestError
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import (
    MAX_TENSOR_BYTES,
    CopySpec,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    check_shards,
    check_tensor,
)
from wsync.spec.recipes import get_recipe


def check_source(source: SourceManifest, name: str = "manifest") -> None:
    """Refuse a trainer that cannot be.

    Raises:
        ManifestError: no ranks, a tensor that is there twice or shares the memory of none, shards of other ranks.
        ShapeMismatchError: a box outside its tensor.
        DtypeMismatchError: a dtype that wsync does not move.
    """
    if not source.ranks:
        raise ManifestError(f"{name} has 0 ranks, needed is at least 1")
    names = {tensor.name for tensor in source.tensors}
    if len(names) != len(source.tensors):
        raise ManifestError(f"{name} has {len(source.tensors)} tensors, but {len(names)} different names")
    checked: set[tuple[int, tuple[int, ...]]] = set()
    for tensor, shards in zip(source.tensors, source.shards, strict=True):
        check_tensor(tensor)
        if tensor.alias_of is not None and tensor.alias_of not in names:
            raise ManifestError(f"{name}: {tensor.name!r} is {tensor.alias_of!r}, which is none of its tensors")
        if len(shards) != len(source.ranks):
            raise ManifestError(f"{name} has {len(source.ranks)} ranks, but shards of {tensor.name!r} on {len(shards)}")
        if (id(shards), tensor.shape) not in checked:
            checked.add((id(shards), tensor.shape))
            first = {id(boxes): rank for rank, boxes in reversed(list(enumerate(shards)))}
            for rank in first.values():
                check_shards(tensor, rank, shards[rank])


def check_sink(sink: SinkManifest, name: str = "manifest") -> None:
    """Refuse engines that cannot be.

    Raises:
        ManifestError: ranks of a replica that are missing or twice; a copy into a storage that is not there, outside
            it or over another copy; a tensor without a recipe.
        RecipeError: a recipe that is unknown.
        DtypeMismatchError: a dtype that wsync does not move.
    """
    _check_replicas(sink.ranks, name)
    checked: set[tuple[int, int, int]] = set()
    for rank in sink.ranks:
        key = (id(rank.copies), id(rank.storages), id(rank.recipes))
        if key not in checked:
            checked.add(key)
            _check_memory(rank, f"{name}: rank {rank.rank} of {rank.replica!r}")


def _check_replicas(ranks: Iterable[SinkRankManifest], name: str) -> None:
    found: dict[str, list[SinkRankManifest]] = defaultdict(list)
    for rank in ranks:
        found[rank.replica].append(rank)
    for replica, members in found.items():
        sizes = sorted({m.world_size for m in members})
        if len(sizes) > 1:
            raise ManifestError(f"{name}: ranks of replica {replica!r} say world sizes {sizes[0]} and {sizes[-1]}")
        numbers = sorted(m.rank for m in members)
        if sizes[0] != len(numbers) or numbers != list(range(len(numbers))):
            wrong = next((n for i, n in enumerate(numbers) if n != i), numbers[-1])
            raise ManifestError(
                f"{name}: replica {replica!r} of world size {sizes[0]} needs each of its ranks once, got "
                f"{len(numbers)}, among them rank {wrong}"
            )


def _check_memory(rank: SinkRankManifest, name: str) -> None:
    for recipe in set(rank.recipes.values()):
        get_recipe(recipe)
    for storage in rank.storages:
        if not 0 <= storage.num_elements * itemsize(storage.dtype) <= MAX_TENSOR_BYTES:
            raise ManifestError(f"{name}: storage {storage.name!r} has {storage.num_elements} elements")
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    written: list[list[tuple[int, int, int]]] = [[] for _ in rank.storages]
    for i, copy in enumerate(rank.copies):
        key = (id(copy.box), id(copy.dst_strides))
        span = spans.get(key)
        if span is None:
            span = spans[key] = _span(copy, name)
        if not 0 <= copy.storage_idx < len(written):
            raise ManifestError(
                f"{name}: a copy of {copy.tensor!r} goes to storage {copy.storage_idx} of {len(written)}"
            )
        if copy.tensor not in rank.recipes:
            raise ManifestError(f"{name}: {copy.tensor!r} has copies, but no recipe; {len(rank.recipes)} others have")
        extent, run = span
        limit = rank.storages[copy.storage_idx].num_elements
        if copy.dst_offset < 0 or copy.dst_offset + extent > limit:
            raise ManifestError(
                f"{name}: a copy of {copy.tensor!r} writes elements {copy.dst_offset} to {copy.dst_offset + extent} "
                f"of a storage of {limit}"
            )
        if extent:
            written[copy.storage_idx].append((copy.dst_offset, run, i))
    for storage, runs in zip(rank.storages, written, strict=True):
        _check_disjoint(storage, runs, rank.copies, name)


def _span(copy: CopySpec, name: str) -> tuple[int, int]:
    """How many elements there are from the first to behind the last that a copy writes, and in its first run."""
    box: Box = copy.box
    if not len(box.offset) == len(box.shape) == len(copy.dst_strides) or min((*box.offset, *box.shape), default=0) < 0:
        raise ManifestError(f"{name}: a copy of {copy.tensor!r} has {box} and strides {copy.dst_strides}")
    if 0 in box.shape:
        return 0, 0
    extent = run = 1
    in_run = True
    for stride, length in sorted((s, n) for s, n in zip(copy.dst_strides, box.shape, strict=True) if n > 1):
        if stride < run:  # also those that are 0 or negative
            raise ManifestError(f"{name}: a copy of {copy.tensor!r} with strides {copy.dst_strides} writes over itself")
        in_run = in_run and stride == run
        run = run * length if in_run else run
        extent += stride * (length - 1)
    return extent, run


def _check_disjoint(
    storage: StorageSpec, runs: list[tuple[int, int, int]], copies: tuple[CopySpec, ...], name: str
) -> None:
    """No copy begins where another one writes without holes."""
    runs.sort()
    end, before = 0, -1
    for offset, run, i in runs:
        if offset < end:
            raise ManifestError(
                f"{name}: copies of {copies[before].tensor!r} and {copies[i].tensor!r} both write element {offset} of "
                f"{storage.name!r}"
            )
        end, before = offset + run, i
