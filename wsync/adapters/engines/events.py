"""From what arrived in live memory to the copies of a manifest: the last write wins, and no value is rounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from wsync.adapters.engines.live import LiveStorage
from wsync.adapters.engines.resolve import Landing, note_landing, resolve
from wsync.adapters.engines.runs import runs_of
from wsync.adapters.engines.sources import Buffer, Constant, Conversion, Initial, Part
from wsync.adapters.engines.strided import Axis, BoxRun, box_runs, dense_span, joined
from wsync.adapters.engines.widening import WIDENED, WIDER, Region, region_of
from wsync.errors import DtypeMismatchError
from wsync.spec.box import contiguous_strides
from wsync.spec.manifest import CopySpec


class LiveConstant(NamedTuple):
    """Live elements that the loader sets to values that do not come from the checkpoint (vocabulary padding).

    Attributes:
        storage_idx: into the recording's storages.
        dst_offset: element of the storage.
        shape, dst_strides: in elements.
        value: 0-d, or of ``shape``.
    """

    storage_idx: int
    dst_offset: int
    shape: tuple[int, ...]
    dst_strides: tuple[int, ...]
    value: torch.Tensor

    def write(self, target: torch.Tensor) -> None:
        """Write it into a flat view of its storage."""
        offset = int(target.storage_offset()) + self.dst_offset
        target.as_strided(self.shape, self.dst_strides, offset).copy_(self.value)


class Arrivals(NamedTuple):
    """What ends up in one live storage.

    Attributes:
        copies: from checkpoint tensors, each element of the storage at most once.
        constants: elements that no copy writes, and each of them once.
        widened: copies into scratch memory in a narrower dtype, with the live elements that they are for.
        direct: elements that the copies write.
        constant: elements that keep a constant.
        raw: tensors that arrive in the trainer's own f32 instead of its rounding to bf16.
    """

    copies: tuple[CopySpec, ...]
    constants: tuple[LiveConstant, ...]
    widened: tuple[tuple[Region, tuple[CopySpec, ...]], ...]
    direct: int
    constant: int
    raw: frozenset[str]

    @property
    def covered(self) -> int:
        """Elements that come from the checkpoint."""
        return self.direct + sum(region.elements for region, _ in self.widened)

    @property
    def all_copies(self) -> Iterator[CopySpec]:
        """Those into live and into scratch memory."""
        yield from self.copies
        for _, copies in self.widened:
            yield from copies


def arrivals_in(
    storage_idx: int, storage: LiveStorage, shape: tuple[int, ...], landings: Sequence[Landing]
) -> Arrivals:
    """Work out what a storage holds after the loader ran.

    Args:
        shape: of a tensor that is the whole storage, or its flat one.

    Raises:
        DtypeMismatchError: a copy converts values, and no recipe gives the live dtype.
    """
    constants: list[LiveConstant] = []
    direct: list[Landing] = []
    narrower: dict[torch.dtype, list[Landing]] = {}
    raw: set[str] = set()
    elements = constant = 0
    for landing, left in _surviving(storage, shape, landings):
        source = landing.source
        if isinstance(source, Constant):
            constant += left
            extents, strides = tuple(a.extent for a in landing.axes), tuple(a.far for a in landing.axes)
            constants.append(LiveConstant(storage_idx, landing.far_offset, extents, strides, source.value))
        elif isinstance(source, Part):
            is_raw, arrives = _road(source, landing.conversions, storage)
            if is_raw:
                raw.add(source.spec.name)
            if arrives is None:
                elements += left
                direct.append(landing)
            else:
                narrower.setdefault(arrives, []).append(landing)
    return Arrivals(
        copies=tuple(_copies(storage_idx, direct)),
        constants=tuple(constants),
        widened=tuple(_widened(storage_idx, dtype, found) for dtype, found in narrower.items()),
        direct=elements,
        constant=constant,
        raw=frozenset(raw),
    )


def _widened(storage_idx: int, dtype: torch.dtype, landings: Sequence[Landing]) -> tuple[Region, tuple[CopySpec, ...]]:
    places = [(x.far_offset, tuple(a.extent for a in x.axes), tuple(a.far for a in x.axes)) for x in landings]
    region = region_of(dtype, places)
    moved = [x._replace(far_offset=x.far_offset - region.first) for x in landings]
    return region, tuple(_copies(storage_idx, moved))


def _copies(storage_idx: int, landings: Sequence[Landing]) -> Iterator[CopySpec]:
    """The copies of landings that do not overlap, in as few boxes as they make."""
    by_part: dict[int, tuple[Part, list[BoxRun]]] = {}
    for landing in landings:
        part = landing.source
        if isinstance(part, Part):
            runs = by_part.setdefault(id(part), (part, []))[1]
            runs.extend(box_runs(part.shape, landing.near_offset, landing.far_offset, landing.axes))
    for part, runs in by_part.values():
        for run in joined(runs):
            yield CopySpec(part.spec.name, part.part.role, run.box, storage_idx, run.offset, run.strides)


def _surviving(storage: LiveStorage, shape: tuple[int, ...], landings: Sequence[Landing]) -> list[tuple[Landing, int]]:
    """The landings that are not overwritten by later ones, with the elements of each that remain."""
    last: dict[object, Landing] = {}
    for landing in landings:
        axes = tuple((a.extent, a.far) for a in landing.axes if a.extent != 1)
        where = (landing.far_offset, axes)
        last.pop(where, None)
        last[where] = landing
    distinct = list(last.values())
    spans = [_interval(landing) for landing in distinct]
    if all(spans):
        ordered = sorted(s for s in spans if s)
        if all(a[1] <= b[0] for a, b in itertools.pairwise(ordered)):
            return [(landing, s[1] - s[0]) for landing, s in zip(distinct, spans, strict=True) if s]
    return _surviving_by_element(storage, shape, distinct)


def _interval(landing: Landing) -> tuple[int, int] | None:
    span = dense_span([a.extent for a in landing.axes], [a.far for a in landing.axes])
    return None if span is None else (landing.far_offset, landing.far_offset + span)


def _surviving_by_element(
    storage: LiveStorage, shape: tuple[int, ...], landings: Sequence[Landing]
) -> list[tuple[Landing, int]]:
    owner = np.full(storage.num_elements, -1, dtype=np.int32)
    for i, landing in enumerate(landings):
        extents = [a.extent for a in landing.axes]
        strides = [a.far * owner.itemsize for a in landing.axes]
        np.lib.stride_tricks.as_strided(owner[landing.far_offset :], extents, strides)[...] = i
    counts = np.bincount(owner[owner >= 0], minlength=len(landings))
    kept: list[tuple[Landing, int]] = []
    for i, landing in enumerate(landings):
        elements, left = _num_elements(landing), int(counts[i])
        in_part = 0 < left < elements
        if in_part and isinstance(landing.source, Part):
            return _last_writes(storage, shape, landings)
        if in_part and isinstance(landing.source, Constant):
            kept.extend(_left_of_constant(landing, landing.source.value, np.flatnonzero(owner == i), storage))
        elif left:
            kept.append((landing, left))
    return kept


def _last_writes(
    storage: LiveStorage, shape: tuple[int, ...], landings: Sequence[Landing]
) -> list[tuple[Landing, int]]:
    """What is left of each landing where a later one overwrites a part of it."""
    memory = Buffer(shape, storage.dtype, Initial(0, storage.names[0]))
    for landing in landings:
        note_landing(memory, landing)
    whole = [Axis(n, s, s) for n, s in zip(shape, contiguous_strides(shape), strict=True)]
    return [(found, _num_elements(found)) for found in resolve(memory, 0, 0, whole)]


def _num_elements(landing: Landing) -> int:
    return int(np.prod([a.extent for a in landing.axes], dtype=np.int64))


def _left_of_constant(
    landing: Landing, value: torch.Tensor, left: np.ndarray[Any, np.dtype[np.int64]], storage: LiveStorage
) -> list[tuple[Landing, int]]:
    """The elements of a constant that later writes left, as rows of equal length and distance where they are such."""
    values = torch.empty(storage.num_elements if value.dim() else 0, dtype=storage.dtype)
    if value.dim():
        shape, strides = [a.extent for a in landing.axes], [a.far for a in landing.axes]
        values.as_strided(shape, strides, landing.far_offset).copy_(value)
    found: list[tuple[Landing, int]] = []
    for run in runs_of(left, left, 1, 1) or ():
        inside = values.as_strided((run.rows, run.length), (run.step, 1), run.first).clone() if value.dim() else value
        axes = (Axis(run.rows, 0, run.step), Axis(run.length, 0, 1))
        found.append((Landing(Constant(inside), 0, run.first, axes, ()), run.rows * run.length))
    return found


def _road(part: Part, conversions: tuple[Conversion, ...], storage: LiveStorage) -> tuple[bool, torch.dtype | None]:
    """Whether the live memory wants the trainer's f32 as it is, and the dtype that must be widened, if one must.

    Raises:
        DtypeMismatchError: every other conversion.
    """
    through = [c for c in conversions if c[0] != c[1]]
    if not through:
        if part.dtype.itemsize != storage.dtype.itemsize:
            raise _mismatch(part, storage)
        return False, None
    first, last = through[0][0], through[-1][1]
    after = {dtype for _, dtype in through}
    if first != part.dtype:
        raise _mismatch(part, storage)
    if last == first and _holds(first, after):
        return False, None
    if last == storage.dtype and first in WIDENED:
        # Offered as bf16, but nothing on the way rounds to it.
        keeps_f32 = part.recipe == "bf16" and part.spec.dtype == "float32" and _holds(torch.float32, after)
        if keeps_f32:
            return True, None if last == torch.float32 else torch.float32
        if _holds(first, after):
            return False, first
    raise _mismatch(part, storage)


def _holds(dtype: torch.dtype, others: set[torch.dtype]) -> bool:
    """Whether each of some dtypes holds every value of ``dtype``."""
    return others <= {dtype} | WIDER.get(dtype, frozenset())


def _mismatch(part: Part, storage: LiveStorage) -> DtypeMismatchError:
    live = str(storage.dtype).removeprefix("torch.")
    return DtypeMismatchError(
        f"{part.part.name!r} is {part.part.dtype} in recipe {part.recipe!r} (the trainer holds {part.spec.dtype}), but "
        f"the engine's {storage.names[0]!r} is {live}, and no recipe converts one to the other",
        hint="declare a recipe whose dtype is the engine's, or change the dtype on one side",
    )
