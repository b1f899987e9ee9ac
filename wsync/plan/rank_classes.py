"""Classes of engine ranks: those that take the same, into the same places. What holds for one holds for all."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from wsync.plan.geometry import bits
from wsync.spec.manifest import SinkManifest, SinkRankManifest


class RankClasses:
    """Numbers classes of engine ranks. A class keeps its number in every later plan, whoever belongs to it
    then, until it is forgotten.

    Ranks of one class have equal copies, recipes, storages and scale groups. The data-parallel replicas of an engine
    share these as objects, so identity is looked at first; manifests that came over a wire are compared by value, or
    made to share them by `shared`.

    Attributes:
        firsts: the first rank of each class, by number.
    """

    def __init__(self) -> None:
        self.firsts: dict[int, SinkRankManifest] = {}
        self._by_id: dict[tuple[int, ...], int] = {}  # of the first ranks, which are kept: an id is one object's
        self._by_size: dict[tuple[int, ...], list[int]] = {}

    def find(self, rank: SinkRankManifest) -> int | None:
        """The class of a rank; None if it has no number yet."""
        found = self._by_id.get(_ids(rank))
        if found is not None:
            return found
        contents = _contents(rank)
        alike = self._by_size.get(_sizes(rank), ())
        return next((n for n in alike if _contents(self.firsts[n]) == contents), None)

    def number(self, rank: SinkRankManifest) -> int:
        """The class of a rank, which gets the lowest free number if it has none."""
        found = self.find(rank)
        return self._add(rank) if found is None else found

    def shared(self, rank: SinkRankManifest) -> SinkRankManifest:
        """An equal manifest that shares what it can with the first rank of its class."""
        first = self.firsts[self.number(rank)]
        return msgspec.structs.replace(
            rank,
            copies=first.copies,
            recipes=first.recipes,
            storages=first.storages,
            scale_groups=first.scale_groups,
        )

    def keep(self, mask: int) -> list[int]:
        """Forget all classes but those of ``mask``. Their numbers, which are returned, are free again."""
        gone = [number for number in self.firsts if not mask >> number & 1]
        for number in gone:
            rank = self.firsts.pop(number)
            del self._by_id[_ids(rank)]
            alike = self._by_size[_sizes(rank)]
            alike.remove(number)
            if not alike:
                del self._by_size[_sizes(rank)]
        return gone

    def _add(self, rank: SinkRankManifest) -> int:
        number = next(n for n in range(len(self.firsts) + 1) if n not in self.firsts)
        self.firsts[number] = rank
        self._by_id[_ids(rank)] = number
        self._by_size.setdefault(_sizes(rank), []).append(number)
        return number


def _ids(rank: SinkRankManifest) -> tuple[int, ...]:
    return tuple(id(x) for x in _contents(rank))


def _sizes(rank: SinkRankManifest) -> tuple[int, ...]:
    return tuple(len(x) for x in _contents(rank))


def _contents(rank: SinkRankManifest) -> tuple[tuple[object, ...] | dict[str, str], ...]:
    return rank.copies, rank.recipes, rank.storages, rank.scale_groups


class Sinks:
    """The engine ranks of one plan by their classes.

    Attributes:
        manifest: of all ranks.
        numbers: the class of each rank.
        by_class: class number -> sink indices, ascending.
        mask: of the classes that are there.
    """

    def __init__(self, manifest: SinkManifest, classes: RankClasses) -> None:
        self.manifest = manifest
        self.numbers = [classes.number(rank) for rank in manifest.ranks]
        self.by_class: dict[int, list[int]] = {}
        for sink_idx, number in enumerate(self.numbers):
            self.by_class.setdefault(number, []).append(sink_idx)
        self.mask = mask_of(self.by_class)
        self._of_mask: dict[int, tuple[int, ...]] = {}

    def of(self, mask: int) -> tuple[int, ...]:
        """The sinks whose classes are in ``mask``, ascending."""
        found = self._of_mask.get(mask)
        if found is None:
            found = tuple(sorted(s for number in bits(mask & self.mask) for s in self.by_class[number]))
            self._of_mask[mask] = found
        return found

    def first(self, mask: int) -> int:
        """The first sink whose class is in ``mask``."""
        return self.of(mask)[0]


def mask_of(numbers: Iterable[int]) -> int:
    """The mask with these bits set."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask
