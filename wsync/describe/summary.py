"""What a described side adds up to: classes of tensors, bytes of each rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import CopySpec, SinkManifest, SinkRankManifest, SourceManifest


class Summary(msgspec.Struct, frozen=True):
    """Sums over one side.

    Attributes:
        num_ranks, num_hosts: of the side.
        num_tensors: that the side has, tied ones once.
        num_classes: of tensors that are laid out alike: same shape, same boxes on the same ranks.
        num_rank_classes: of ranks that hold or need exactly the same.
        num_boxes: that all ranks hold, or copies that they receive.
        bytes_by_dtype: of what travels of one copy of the side's tensors: the trainer's, or the parts of the recipes.
        rank_bytes_min, rank_bytes_max: that a rank holds, or receives.
        total_bytes: of all ranks.
    """

    num_ranks: int
    num_hosts: int
    num_tensors: int
    num_classes: int
    num_rank_classes: int
    num_boxes: int
    bytes_by_dtype: dict[str, int]
    rank_bytes_min: int
    rank_bytes_max: int
    total_bytes: int


def summarise(manifest: SourceManifest | SinkManifest) -> Summary:
    """The sums of a manifest. Linear in the distinct things that it has, not in what they stand for."""
    return _of_source(manifest) if isinstance(manifest, SourceManifest) else _of_sink(manifest)


def _of_source(manifest: SourceManifest) -> Summary:
    num_ranks = len(manifest.ranks)
    bytes_of_rank, num_boxes = [0] * num_ranks, 0
    by_dtype: dict[str, int] = defaultdict(int)
    alike: dict[tuple[int, str, tuple[int, ...]], int] = defaultdict(int)
    held: dict[int, tuple[tuple[Box, ...], ...]] = {}
    for tensor, shards in zip(manifest.tensors, manifest.shards, strict=True):
        if tensor.alias_of is None:
            held[id(shards)] = shards
            alike[(id(shards), tensor.dtype, tensor.shape)] += 1
            by_dtype[tensor.dtype] += Box.whole(tensor.shape).num_elements * itemsize(tensor.dtype)
    for (key, dtype, _), count in alike.items():
        for rank, boxes in enumerate(held[key]):
            bytes_of_rank[rank] += count * itemsize(dtype) * sum(box.num_elements for box in boxes)
            num_boxes += count * len(boxes)
    columns = set(zip(*(held[key] for key in {key for key, _, _ in alike}), strict=True))
    return Summary(
        num_ranks=num_ranks,
        num_hosts=len({rank.host for rank in manifest.ranks}),
        num_tensors=sum(alike.values()),
        num_classes=len(alike),
        num_rank_classes=len(columns),
        num_boxes=num_boxes,
        bytes_by_dtype=dict(sorted(by_dtype.items())),
        rank_bytes_min=min(bytes_of_rank, default=0),
        rank_bytes_max=max(bytes_of_rank, default=0),
        total_bytes=sum(bytes_of_rank),
    )


def _of_sink(manifest: SinkManifest) -> Summary:
    memories: dict[int, SinkRankManifest] = {id(rank.copies): rank for rank in manifest.ranks}
    bytes_of = {key: _copied_bytes(rank) for key, rank in memories.items()}
    of_ranks = [bytes_of[id(rank.copies)] for rank in manifest.ranks]
    taken: dict[str, list[tuple[int, str, Box]]] = defaultdict(list)
    for idx, rank in enumerate(memories.values()):
        for copy in rank.copies:
            taken[copy.tensor].append((idx, copy.role, copy.box))
    recipes = {name: recipe for rank in memories.values() for name, recipe in rank.recipes.items()}
    return Summary(
        num_ranks=len(manifest.ranks),
        num_hosts=len({rank.info.host for rank in manifest.ranks}),
        num_tensors=len(taken),
        num_classes=len({(recipes[name], *boxes) for name, boxes in taken.items()}),
        num_rank_classes=len({rank.copies for rank in memories.values()}),
        num_boxes=sum(len(rank.copies) for rank in manifest.ranks),
        bytes_by_dtype=_distinct_bytes(memories.values()),
        rank_bytes_min=min(of_ranks, default=0),
        rank_bytes_max=max(of_ranks, default=0),
        total_bytes=sum(of_ranks),
    )


def _copied_bytes(rank: SinkRankManifest) -> int:
    return sum(c.box.num_elements * itemsize(rank.storages[c.storage_idx].dtype) for c in rank.copies)


def _distinct_bytes(ranks: Iterable[SinkRankManifest]) -> dict[str, int]:
    """Bytes of what is needed anywhere, once; layouts cut a part into boxes that are disjoint or equal."""
    by_dtype: dict[str, int] = defaultdict(int)
    seen: set[tuple[str, str, Box]] = set()
    for rank in ranks:
        for copy in rank.copies:
            if _is_new(copy, seen):
                dtype = rank.storages[copy.storage_idx].dtype
                by_dtype[dtype] += copy.box.num_elements * itemsize(dtype)
    return dict(sorted(by_dtype.items()))


def _is_new(copy: CopySpec, seen: set[tuple[str, str, Box]]) -> bool:
    key = (copy.tensor, copy.role, copy.box)
    is_new = key not in seen
    seen.add(key)
    return is_new
