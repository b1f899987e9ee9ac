"""From what arrived in live memory to the copies of a manifest: the last write wins, and no value is converted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from wsync.adapters.engines.live import LiveStorage
from wsync.adapters.engines.standins import Constant, Conversion, Initial, Landing, Part
from wsync.adapters.engines.strided import Axis, box_runs, dense_span
from wsync.errors import DtypeMismatchError, RecordError
from wsync.spec.manifest import CopySpec

_WIDER: dict[torch.dtype, set[torch.dtype]] = {
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float16: {torch.float32, torch.float64},
    torch.float8_e4m3fn: {torch.bfloat16, torch.float16, torch.float32, torch.float64},
    torch.float32: {torch.float64},
}
"""Dtypes that hold every value of another one, so that there and back changes nothing."""


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
        covered: elements that the copies write.
        constant: elements that keep a constant.
        raw: tensors that arrive in the trainer's own f32 instead of its rounding to bf16.
    """

    copies: tuple[CopySpec, ...]
    constants: tuple[LiveConstant, ...]
    covered: int
    constant: int
    raw: frozenset[str]


def arrivals_in(storage_idx: int, storage: LiveStorage, landings: Sequence[Landing]) -> Arrivals:
    """Work out what a storage holds after the loader ran.

    Raises:
        RecordError: a copy is overwritten in part.
        DtypeMismatchError: a copy converts values, and no recipe gives the live dtype.
    """
    kept = _surviving(storage, landings)
    copies: list[CopySpec] = []
    constants: list[LiveConstant] = []
    raw: set[str] = set()
    covered = constant = 0
    for landing, elements in kept:
        if isinstance(landing.source, Initial):
            continue
        shape, strides = tuple(a.extent for a in landing.axes), tuple(a.far for a in landing.axes)
        if isinstance(landing.source, Constant):
            constant += elements
            constants.append(LiveConstant(storage_idx, landing.far_offset, shape, strides, landing.source.value))
            continue
        covered += elements
        part = landing.source
        if _arrives_raw(part, landing.conversions, storage):
            raw.add(part.spec.name)
        for run in box_runs(part.shape, landing.near_offset, landing.far_offset, landing.axes):
            copies.append(CopySpec(part.spec.name, part.part.role, run.box, storage_idx, run.offset, run.strides))
    return Arrivals(tuple(copies), tuple(constants), covered, constant, frozenset(raw))


def _surviving(storage: LiveStorage, landings: Sequence[Landing]) -> list[tuple[Landing, int]]:
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
    return _surviving_by_element(storage, distinct)


def _interval(landing: Landing) -> tuple[int, int] | None:
    span = dense_span([a.extent for a in landing.axes], [a.far for a in landing.axes])
    return None if span is None else (landing.far_offset, landing.far_offset + span)


def _surviving_by_element(storage: LiveStorage, landings: Sequence[Landing]) -> list[tuple[Landing, int]]:
    owner = np.full(storage.num_elements, -1, dtype=np.int32)
    for i, landing in enumerate(landings):
        shape = [a.extent for a in landing.axes]
        strides = [a.far * owner.itemsize for a in landing.axes]
        np.lib.stride_tricks.as_strided(owner[landing.far_offset :], shape, strides)[...] = i
    counts = np.bincount(owner[owner >= 0], minlength=len(landings))
    kept = []
    for i, landing in enumerate(landings):
        elements, left = _num_elements(landing), int(counts[i])
        if isinstance(landing.source, Part) and 0 < left < elements:
            raise RecordError(
                f"the loader writes {landing.source.part.name!r} into the engine's {storage.names[0]!r} and then "
                f"overwrites {elements - left} of its {elements} elements"
            )
        if isinstance(landing.source, Constant) and 0 < left < elements:
            kept.extend(_left_of_constant(landing, landing.source.value, np.flatnonzero(owner == i), storage))
        elif left:
            kept.append((landing, left))
    return kept


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
    breaks = np.flatnonzero(np.diff(left) != 1) + 1
    starts = left[np.concatenate(([0], breaks))]
    lengths = np.diff(np.concatenate(([0], breaks, [len(left)])))
    longer, gaps = _changes(lengths), _changes(np.diff(starts)) + 1
    found: list[tuple[Landing, int]] = []
    first = 0
    while first < len(starts):
        ends = (
            *longer[np.searchsorted(longer, first, "right") :][:1],
            *gaps[np.searchsorted(gaps, first + 1, "right") :][:1],
        )
        end = int(min(ends, default=len(starts)))
        count, length, offset = end - first, int(lengths[first]), int(starts[first])
        pitch = int(starts[first + 1]) - offset if count > 1 else 0
        inside = values.as_strided((count, length), (pitch, 1), offset).clone() if value.dim() else value
        axes = (Axis(count, 0, pitch), Axis(length, 0, 1))
        found.append((Landing(Constant(inside), 0, offset, axes, ()), count * length))
        first = end
    return found


def _changes(values: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The indices at which a value differs from the one before."""
    return np.flatnonzero(np.diff(values)) + 1


def _arrives_raw(part: Part, conversions: tuple[Conversion, ...], storage: LiveStorage) -> bool:
    """Whether the live memory wants the trainer's f32 as it is; refuses every other conversion."""
    through = [c for c in conversions if c[0] != c[1]]
    if not through:
        if part.dtype.itemsize != storage.dtype.itemsize:
            raise _mismatch(part, storage)
        return False
    first, last = through[0][0], through[-1][1]
    between = {dtype for c in through for dtype in c} - {first}
    if first == last == part.dtype and between <= _WIDER.get(first, set()):
        return False
    rounded_f32 = part.recipe == "bf16" and part.spec.dtype == "float32"
    if (
        rounded_f32
        and (first, last, storage.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        and len(between) == 1
    ):
        return True
    raise _mismatch(part, storage)


def _mismatch(part: Part, storage: LiveStorage) -> DtypeMismatchError:
    live = str(storage.dtype).removeprefix("torch.")
    return DtypeMismatchError(
        f"{part.part.name!r} is {part.part.dtype} in recipe {part.recipe!r} (the trainer holds {part.spec.dtype}), but "
        f"the engine's {storage.names[0]!r} is {live}, and no recipe converts one to the other",
        hint="declare a recipe whose dtype is the engine's, or change the dtype on one side",
    )
