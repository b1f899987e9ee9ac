"""Scale groups that follow from an engine's layout: tensors that it fuses into one matrix have one scale there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from wsync.errors import ConfigError
from wsync.spec.manifest import CopySpec, SinkRankManifest
from wsync.spec.recipes import get_recipe

Groups = tuple[tuple[str, ...], ...]
"""Checkpoint names of tensors that share an amax."""


Matrix = tuple[str, tuple[int, ...]]
"""A live tensor and which of its matrices."""


def fused_groups(manifest: SinkRankManifest, matrix_at: Callable[[int, int], Matrix]) -> Groups:
    """The tensors whose weights an engine rank keeps in the same matrices of the same storages, by recipe.

    Only tensors whose recipe has a scale of the whole tensor count. A live tensor of three or more dimensions is a
    stack of matrices (experts): tensors of different experts are in different groups.

    Args:
        manifest: of the rank.
        matrix_at: for a storage and an element of it the matrix that it belongs to.
    """
    homes: dict[str, set[tuple[int, Matrix]]] = {}
    for copy in manifest.copies:
        needs_amax = get_recipe(manifest.recipes[copy.tensor]).needs_amax
        if needs_amax and copy.role == "weight" and copy.box.num_elements:
            idx = copy.storage_idx
            homes.setdefault(copy.tensor, set()).update((idx, matrix_at(idx, first)) for first in _firsts(copy))
    groups: dict[tuple[str, frozenset[tuple[int, Matrix]]], list[str]] = {}
    for name, places in homes.items():
        groups.setdefault((manifest.recipes[name], frozenset(places)), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _firsts(copy: CopySpec) -> Iterator[int]:
    """The first element, in the storage, of every matrix that a copy writes."""
    for index in itertools.product(*(range(n) for n in copy.box.shape[:-2])):
        yield copy.dst_offset + sum(i * s for i, s in zip(index, copy.dst_strides, strict=False))


def given_groups(groups: Iterable[Iterable[str]]) -> Groups:
    """Groups as a caller gives them.

    Raises:
        ConfigError: they are not groups of names.
    """
    found = []
    for group in groups:
        names = (group,) if isinstance(group, str) else tuple(group)
        if isinstance(group, str) or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"scale_groups is a list of groups of checkpoint names, but {group!r} is one of them")
        found.append(names)
    return tuple(found)
