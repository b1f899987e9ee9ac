"""Stand-ins: tensors that carry no data but know, element by element, which checkpoint tensor they come from.

A stand-in is a strided view of a *source*. The torch side sees a tensor of the right shape, strides and dtype whose
twin lives on the meta device, so that every view composes by itself. A source is either a `Part` (a tensor of the
checkpoint) or a `Buffer` (memory that the loader allocated: a clone, a concatenation; or live memory that it reads),
which lists what was written where. A copy out of a buffer remembers how much had been written to it by then, so that
memory may be used again. `resolve` follows a view through buffers down to checkpoint tensors and constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from wsync.adapters.engines.strided import Axis, box_runs, subtract
from wsync.errors import RecordError
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import PartSpec

Conversion = tuple[torch.dtype, torch.dtype]
"""Dtypes before and after a copy that changed them."""


class Part:
    """A part of a checkpoint tensor in its recipe, row major.

    Attributes:
        spec: the tensor in the trainer's name table.
        part: the part that an engine's checkpoint of that recipe holds.
        recipe: of the tensor.
        computed: what a loader did to it in place, or empty; then it is no longer a copy.
    """

    def __init__(self, spec: TensorSpec, part: PartSpec, recipe: str) -> None:
        self.spec = spec
        self.part = part
        self.recipe = recipe
        self.dtype: torch.dtype = getattr(torch, part.dtype)
        self.shape = part.shape
        self.computed = ""

    @property
    def names(self) -> set[str]:
        """The checkpoint tensors that this is made of."""
        return {self.part.name}


class Constant(NamedTuple):
    """Values that do not come from the checkpoint.

    Attributes:
        value: 0-d, or of the box's shape.
    """

    value: torch.Tensor


class Computed(NamedTuple):
    """Values that an operation made, which is no copy.

    Attributes:
        operation: which one.
        names: the tensors that it read.
    """

    operation: str
    names: frozenset[str]


class Initial(NamedTuple):
    """What live memory held before the loader ran.

    Attributes:
        storage_idx: which piece of it.
        name: of a tensor in it.
    """

    storage_idx: int
    name: str


class Write(NamedTuple):
    """A box of a buffer that was written.

    Attributes:
        box: in the buffer's coordinates.
        source: what it was written from.
        offset, strides: where in the source, in elements of it, one stride for each dimension of the box.
        conversions: dtypes that the values went through on this copy.
        num_writes: how often the source, where it is a buffer, had been written by then.
    """

    box: Box
    source: Part | Buffer | Constant | Computed
    offset: int = 0
    strides: tuple[int, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    num_writes: int = 0


class Buffer:
    """Memory that the loader allocated, or live memory.

    Attributes:
        shape: in the order of its memory.
        background: what it holds where nothing was written: a 0-d constant, a tensor of ``shape``, the bytes that live
            memory held before, or None (nothing).
        writes: in order of time; later ones hide earlier ones. Only ever appended to.
        names: the tensors that it is or was made of.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, background: torch.Tensor | Initial | None = None
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self.background = background
        self.writes: list[Write] = []
        self.names: set[str] = {background.name} if isinstance(background, Initial) else set()

    @property
    def computed(self) -> str:
        """The first operation that computed something in it, or empty."""
        return next((w.source.operation for w in self.writes if isinstance(w.source, Computed)), "")


Origin = Part | Buffer


class StridedView(NamedTuple):
    """A strided view of a source, as one end of a copy."""

    source: Origin
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def expanded(self, shape: Sequence[int]) -> StridedView:
        """The view broadcast to ``shape``, with stride 0 where it repeats.

        Raises:
            RuntimeError: as torch does, where it cannot be broadcast.
        """
        twin = torch.empty_strided(self.shape, self.strides, device="meta").expand(tuple(shape))
        return self._replace(shape=tuple(shape), strides=tuple(twin.stride()))


class StandIn(torch.Tensor):
    """A tensor without data that is a view of a `Part` or a `Buffer`. Every operation on it goes to the recorder."""

    source: Origin
    twin: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[StandIn], source: Origin, twin: torch.Tensor) -> StandIn:
        self: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            twin.size(),
            strides=twin.stride(),
            storage_offset=twin.storage_offset(),
            dtype=twin.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        self.source = source
        self.twin = twin
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({'+'.join(sorted(self.source.names))}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RecordError(f"a stand-in was used in {func} outside of the recording")

    @property
    def view_of_source(self) -> StridedView:
        """This stand-in as one end of a copy."""
        t = self.twin
        return StridedView(self.source, int(t.storage_offset()), tuple(t.shape), tuple(t.stride()), t.dtype)


def stand_in_for(part: Part) -> StandIn:
    """The stand-in for a whole part."""
    return StandIn(part, torch.empty(part.shape, dtype=part.dtype, device="meta"))


def buffer_like(twin: torch.Tensor, background: torch.Tensor | None = None) -> StandIn:
    """A new buffer laid out like ``twin``: a meta tensor without gaps, in whatever order of dimensions."""
    order = sorted(range(twin.dim()), key=lambda d: (-int(twin.stride()[d]), d))
    return StandIn(Buffer([twin.shape[d] for d in order], twin.dtype, background), twin)


def whole_view(source: Origin, shape: Sequence[int]) -> StridedView:
    """A source that is contiguous in ``shape``."""
    return StridedView(source, 0, tuple(shape), contiguous_strides(tuple(shape)), source.dtype)


def write(dst: StridedView, src: StridedView | Constant | Computed) -> None:
    """Note that a view of a buffer was written.

    Raises:
        RecordError: ``dst`` is a checkpoint tensor, or live memory.
    """
    buffer = dst.source
    if isinstance(buffer, Part):
        raise RecordError(f"the loader writes into the checkpoint tensor {buffer.part.name!r}")
    if isinstance(buffer.background, Initial):
        raise RecordError(f"the loader writes the engine's {buffer.background.name!r} in a way that is not followed")
    if isinstance(src, Constant):
        _write_constant(buffer, dst, src)
        return
    if isinstance(src, Computed):
        buffer.names |= src.names
        far = whole_view(buffer, dst.shape)
        buffer.writes.extend(Write(r.box, src) for r in box_runs(buffer.shape, dst.offset, 0, axes_of(dst, far)))
        return
    src = src.expanded(dst.shape)
    conversions = () if src.dtype == dst.dtype else ((src.dtype, dst.dtype),)
    note(buffer, dst.offset, src.source, src.offset, axes_of(dst, src), conversions)


def note(
    buffer: Buffer,
    near_offset: int,
    source: Origin,
    far_offset: int,
    axes: Iterable[Axis],
    conversions: tuple[Conversion, ...] = (),
    num_writes: int | None = None,
) -> None:
    """Append a copy out of ``source``, as it is now or after its first ``num_writes``, to a buffer's writes."""
    if num_writes is None:
        num_writes = len(source.writes) if isinstance(source, Buffer) else 0
    for run in box_runs(buffer.shape, near_offset, far_offset, axes):
        buffer.writes.append(Write(run.box, source, run.offset, run.strides, conversions, num_writes))
    buffer.names |= source.names


def note_constant(buffer: Buffer, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], value: Any) -> None:
    """Append a constant, 0-d or of ``shape`` and in the buffer's dtype, to a buffer's writes."""
    value = value.contiguous()
    axes = [Axis(n, a, b) for n, a, b in zip(shape, strides, contiguous_strides(shape), strict=True)]
    for run in box_runs(buffer.shape, offset, 0, axes):
        inside = value.as_strided(run.box.shape, run.strides, run.offset) if value.dim() else value
        buffer.writes.append(Write(run.box, Constant(inside.clone())))


def _write_constant(buffer: Buffer, dst: StridedView, constant: Constant) -> None:
    value = constant.value.expand(dst.shape) if constant.value.dim() else constant.value
    note_constant(buffer, dst.offset, dst.shape, dst.strides, value.to(dst.dtype).view(buffer.dtype))


def axes_of(near: StridedView, far: StridedView) -> list[Axis]:
    """The axes of a copy between two views of one shape."""
    return [Axis(n, a, b) for n, a, b in zip(near.shape, near.strides, far.strides, strict=True)]


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
    num_writes = len(source.writes) if isinstance(source, Buffer) else 0
    # A list instead of recursion: a chain of copies may be longer than the interpreter's stack.
    todo: list[Landing | _Step] = [_Step(source, num_writes, near_offset, far_offset, tuple(axes), conversions)]
    while todo:
        step = todo.pop()
        if isinstance(step, Landing):
            yield step
        elif isinstance(step.source, Part):
            if step.source.computed:
                raise _computed_error(step.source.computed, step.source.names)
            yield Landing(step.source, step.near_offset, step.far_offset, step.axes, step.conversions)
        elif step.source is not far or not _is_unchanged(step.source, step):
            found: list[Landing | _Step] = []
            for run in box_runs(step.source.shape, step.near_offset, step.far_offset, step.axes):
                found.extend(_inside_box(step.source, step, run.box, run.offset, run.strides))
            todo.extend(reversed(found))


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
    remaining = [wanted]
    for written in reversed(buffer.writes[: step.num_writes]):
        if not remaining:
            return
        left: list[Box] = []
        for box in remaining:
            common = box.intersect(written.box)
            if common is None:
                left.append(box)
                continue
            left.extend(subtract(box, common))
            far = far_offset + _distance(common, wanted, far_strides)
            yield _inside_write(written, common, far, far_strides, step.conversions)
        remaining = left
    for box in remaining:
        far = far_offset + _distance(box, wanted, far_strides)
        yield _background(buffer, box, far, far_strides, step.conversions)


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
    if isinstance(buffer.background, Initial):
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
