"""Follows a view through buffers down to checkpoint tensors, constants and live bytes from before the loader ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from wsync.adapters.engines.sources import (
    Buffer,
    Computed,
    Constant,
    Conversion,
    Initial,
    Origin,
    Part,
    Write,
    num_writes,
)
from wsync.adapters.engines.standins import note, note_constant
from wsync.adapters.engines.strided import Axis, box_runs
from wsync.errors import RecordError
from wsync.spec.box import Box, contiguous_strides


class Landing(NamedTuple):
    """Elements of a checkpoint tensor, constants, or earlier live bytes that arrive at far memory.

    Attributes:
        source: where they come from.
        near_offset: element of the part's flat form, or of the live storage (0 for constants).
        far_offset: element of the far memory.
        axes: near strides are those of the part or the live storage, 0 for constants.
        conversions: dtypes that the values went through on the way.
    """

    source: Part | Constant | Initial
    near_offset: int
    far_offset: int
    axes: tuple[Axis, ...]
    conversions: tuple[Conversion, ...]


def note_landing(memory: Buffer, landing: Landing) -> None:
    """Append a landing to the writes of the buffer that is its far memory."""
    source = landing.source
    if isinstance(source, Constant):
        shape, strides = tuple(a.extent for a in landing.axes), tuple(a.far for a in landing.axes)
        note_constant(memory, landing.far_offset, shape, strides, source.value)
        return
    axes = [Axis(a.extent, a.far, a.near) for a in landing.axes]
    # Bytes from before the loader ran are those of this very buffer without any write.
    origin = source if isinstance(source, Part) else memory
    note(memory, landing.far_offset, origin, landing.near_offset, axes, landing.conversions, after=0)


class _Step(NamedTuple):
    """A copy that is still to be followed into its source."""

    source: Origin
    num_writes: int
    near_offset: int
    far_offset: int
    axes: tuple[Axis, ...]
    conversions: tuple[Conversion, ...]


def resolve(
    source: Origin,
    near_offset: int,
    far_offset: int,
    axes: Iterable[Axis],
    conversions: tuple[Conversion, ...] = (),
    far: Buffer | None = None,
) -> Iterator[Landing]:
    """Follow a copy out of a source, as it is now, down to checkpoint tensors, constants and earlier live bytes.

    Args:
        far: the far memory as a buffer, if there is one: what it holds already does not land in it again.

    Raises:
        RecordError: values that were computed, or memory that was never written.
    """
    # A list instead of recursion: a chain of copies may be longer than the interpreter's stack.
    todo: list[Landing | _Step] = [_Step(source, num_writes(source), near_offset, far_offset, tuple(axes), conversions)]
    while todo:
        step = todo.pop()
        if isinstance(step, Landing):
            yield step
        elif isinstance(step.source, Part) and not step.num_writes:
            yield Landing(step.source, step.near_offset, step.far_offset, step.axes, step.conversions)
        else:
            buffer = step.source.memory() if isinstance(step.source, Part) else step.source
            if buffer is not far or not _is_unchanged(buffer, step):
                todo.extend(reversed(_inside_buffer(buffer, step)))


def _inside_buffer(buffer: Buffer, step: _Step) -> list[Landing | _Step]:
    found: list[Landing | _Step] = []
    for run in box_runs(buffer.shape, step.near_offset, step.far_offset, step.axes):
        found.extend(_inside_box(buffer, step, run.box, run.offset, run.strides))
    return found


def _is_unchanged(buffer: Buffer, step: _Step) -> bool:
    """Whether a copy out of a buffer into the same elements of it changes none."""
    in_place = step.near_offset == step.far_offset and all(a.near == a.far for a in step.axes if a.extent > 1)
    return in_place and not step.conversions and step.num_writes == len(buffer.writes)


def _computed_error(operation: str, names: Iterable[str]) -> RecordError:
    read = " and ".join(repr(n) for n in sorted(names)) or "its input"
    return RecordError(f"the loader copies what {operation} computed from {read}; only copies can be recorded")


def _inside_box(
    buffer: Buffer, step: _Step, wanted: Box, far_offset: int, far_strides: tuple[int, ...]
) -> Iterator[Landing | _Step]:
    """What a box of a buffer holds after the step's number of writes."""
    for part, written in buffer.holds(wanted, step.num_writes):
        far = far_offset + _distance(part, wanted, far_strides)
        if written is None:
            yield _background(buffer, part, far, far_strides, step.conversions)
        else:
            yield _inside_write(written, part, far, far_strides, step.conversions)


def _inside_write(
    written: Write, box: Box, far: int, far_strides: tuple[int, ...], conversions: tuple[Conversion, ...]
) -> Landing | _Step:
    if isinstance(written.source, Computed):
        raise _computed_error(*written.source)
    if isinstance(written.source, Constant):
        value = _inside(written.source.value, box, written.box)
        return _constant_landing(value, box, far, far_strides, conversions)
    near = written.offset + _distance(box, written.box, written.strides)
    axes = tuple(Axis(n, a, b) for n, a, b in zip(box.shape, written.strides, far_strides, strict=True))
    return _Step(written.source, written.num_writes, near, far, axes, written.conversions + conversions)


def _background(
    buffer: Buffer, box: Box, far: int, far_strides: tuple[int, ...], conversions: tuple[Conversion, ...]
) -> Landing:
    if isinstance(buffer.background, Initial | Part):
        strides = contiguous_strides(buffer.shape)
        near = sum(o * s for o, s in zip(box.offset, strides, strict=True))
        axes = tuple(Axis(n, a, b) for n, a, b in zip(box.shape, strides, far_strides, strict=True))
        return Landing(buffer.background, near, far, axes, conversions)
    if buffer.background is None:
        raise RecordError(
            f"the loader copies memory that it never wrote: {box.num_elements} elements at {box.offset} of a "
            f"buffer of shape {buffer.shape} made of {sorted(buffer.names)}"
        )
    value = _inside(buffer.background, box, Box.whole(buffer.shape))
    return _constant_landing(value, box, far, far_strides, conversions)


def _constant_landing(
    value: torch.Tensor, box: Box, far: int, far_strides: tuple[int, ...], conversions: tuple[Conversion, ...]
) -> Landing:
    axes = tuple(Axis(n, 0, s) for n, s in zip(box.shape, far_strides, strict=True))
    return Landing(Constant(value), 0, far, axes, conversions)


def _distance(box: Box, origin: Box, strides: tuple[int, ...]) -> int:
    return sum((a - b) * s for a, b, s in zip(box.offset, origin.offset, strides, strict=True))


def _inside(value: torch.Tensor, box: Box, origin: Box) -> torch.Tensor:
    """The part of a constant that fills ``box``, where the whole fills ``origin``."""
    if value.dim() == 0:
        return value
    for dim, (low, start, extent) in enumerate(zip(box.offset, origin.offset, box.shape, strict=True)):
        value = value.narrow(dim, low - start, extent)
    return value
