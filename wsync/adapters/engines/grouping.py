"""Scale groups that follow from an engine's layout: tensors that it fuses into one matrix have one scale there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from wsync.errors import ConfigError
from wsync.spec.manifest import CopySpec, SinkRankManifest
from wsync.spec.recipes import get_recipe

Groups = tuple[tuple[str, ...], ...]
"""Checkpoint names of tensors that share an amax."""


def fused_groups(manifest: SinkRankManifest, shape_of: Callable[[int], Sequence[int]]) -> Groups:
    """The tensors whose weights an engine rank keeps in the same matrices of the same storages, by recipe.

    Only tensors whose recipe has a scale of the whole tensor count. A storage of three or more dimensions is a stack of
    matrices (experts): tensors of different experts are in different groups.

    Args:
        manifest: of the rank.
        shape_of: gives the shape of the live tensor that is a storage.
    """
    homes: dict[str, set[tuple[int, int]]] = {}
    for copy in manifest.copies:
        needs_amax = get_recipe(manifest.recipes[copy.tensor]).needs_amax
        if needs_amax and copy.role == "weight" and copy.box.num_elements:
            homes.setdefault(copy.tensor, set()).update(_matrices(copy, shape_of(copy.storage_idx)))
    groups: dict[tuple[str, frozenset[tuple[int, int]]], list[str]] = {}
    for name, places in homes.items():
        groups.setdefault((manifest.recipes[name], frozenset(places)), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _matrices(copy: CopySpec, shape: Sequence[int]) -> set[tuple[int, int]]:
    """The storage and the numbers of the matrices in it that a copy writes to."""
    size = max(math.prod(shape[-2:]), 1) if len(shape) > 2 else None
    batch = [range(n) for n in copy.box.shape[:-2]]
    firsts = (
        copy.dst_offset + sum(i * s for i, s in zip(index, copy.dst_strides, strict=False))
        for index in itertools.product(*batch)
    )
    return {(copy.storage_idx, 0 if size is None else first // size) for first in firsts}


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
