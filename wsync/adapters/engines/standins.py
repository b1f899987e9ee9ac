"""Stand-ins: tensors that carry no data but know, element by element, which checkpoint tensor they come from.

A stand-in is a strided view of a *source*. The torch side sees a tensor of the right shape, strides and dtype whose
twin lives on the meta device, so that every view composes by itself. A source is either a `Part` (a tensor of the
checkpoint) or a `Buffer` (memory that the loader allocated: a clone, a concatenation), which lists what was written
where. `resolve` follows a view through buffers down to checkpoint tensors and constants.
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


class Write(NamedTuple):
    """A box of a buffer that was written.

    Attributes:
        box: in the buffer's coordinates.
        source: what it was written from, or a constant.
        offset, strides: where in the source, in elements of it, one stride for each dimension of the box.
        conversions: dtypes that the values went through on this copy.
    """

    box: Box
    source: Part | Buffer | Constant
    offset: int = 0
    strides: tuple[int, ...] = ()
    conversions: tuple[Conversion, ...] = ()


class Buffer:
    """Memory that the loader allocated.

    Attributes:
        shape: in the order of its memory.
        background: what it holds where nothing was written: a 0-d constant, a tensor of ``shape``, or None (nothing).
        writes: in order of time; later ones hide earlier ones.
        computed: the operation that filled it, where that was no copy.
        made_of: checkpoint tensors that such an operation read.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, background: torch.Tensor | None = None) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self.background = background
        self.writes: list[Write] = []
        self.computed = ""
        self.made_of: set[str] = set()

    @property
    def names(self) -> set[str]:
        """The checkpoint tensors that this is made of."""
        return self.made_of | {
            name for w in self.writes if not isinstance(w.source, Constant) for name in w.source.names
        }


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


def write(dst: StridedView, src: StridedView | Constant) -> None:
    """Note that a view of a buffer was written.

    Raises:
        RecordError: ``dst`` is a checkpoint tensor.
    """
    buffer = dst.source
    if isinstance(buffer, Part):
        raise RecordError(f"the loader writes into the checkpoint tensor {buffer.part.name!r}")
    if isinstance(src, Constant):
        _write_constant(buffer, dst, src)
        return
    src = src.expanded(dst.shape)
    conversions = () if src.dtype == dst.dtype else ((src.dtype, dst.dtype),)
    for run in box_runs(buffer.shape, dst.offset, src.offset, axes_of(dst, src)):
        buffer.writes.append(Write(run.box, src.source, run.offset, run.strides, conversions))


def _write_constant(buffer: Buffer, dst: StridedView, constant: Constant) -> None:
    value = constant.value.expand(dst.shape).to(dst.dtype).contiguous()
    far = whole_view(buffer, dst.shape)
    for run in box_runs(buffer.shape, dst.offset, 0, axes_of(dst, far)):
        inside = value.as_strided(run.box.shape, run.strides, run.offset) if value.dim() else value
        buffer.writes.append(Write(run.box, Constant(inside.clone())))


def axes_of(near: StridedView, far: StridedView) -> list[Axis]:
    """The axes of a copy between two views of one shape."""
    return [Axis(n, a, b) for n, a, b in zip(near.shape, near.strides, far.strides, strict=True)]


class Landing(NamedTuple):
    """Elements of a checkpoint tensor, or constants, that arrive at far memory.

    Attributes:
        source: where they come from.
        near_offset: element of the part's flat form (parts only).
        far_offset: element of the far memory.
        axes: near strides are those of the part, 0 for constants.
        conversions: dtypes that the values went through on the way.
    """

    source: Part | Constant
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
) -> Iterator[Landing]:
    """Follow a copy out of a source down to checkpoint tensors and constants.

    Raises:
        RecordError: values that were computed, or memory that was never written.
    """
    if source.computed:
        names = " and ".join(repr(n) for n in sorted(source.names)) or "its input"
        raise RecordError(
            f"the loader copies what {source.computed} computed from {names}; only copies can be recorded"
        )
    if isinstance(source, Part):
        yield Landing(source, near_offset, far_offset, tuple(axes), conversions)
        return
    for run in box_runs(source.shape, near_offset, far_offset, axes):
        yield from _resolve_box(source, run.box, run.offset, run.strides, conversions)


def _resolve_box(
    buffer: Buffer, wanted: Box, far_offset: int, far_strides: tuple[int, ...], conversions: tuple[Conversion, ...]
) -> Iterator[Landing]:
    remaining = [wanted]
    for written in reversed(buffer.writes):
        left: list[Box] = []
        for box in remaining:
            common = box.intersect(written.box)
            if common is None:
                left.append(box)
                continue
            left.extend(subtract(box, common))
            far = far_offset + _distance(common, wanted, far_strides)
            yield from _resolve_write(written, common, far, far_strides, conversions)
        remaining = left
    for box in remaining:
        if buffer.background is None:
            raise RecordError(
                f"the loader copies memory that it never wrote: {box.num_elements} elements at {box.offset} of a "
                f"buffer of shape {buffer.shape} made of {sorted(buffer.names)}"
            )
        far = far_offset + _distance(box, wanted, far_strides)
        value = _inside(buffer.background, box, Box.whole(buffer.shape))
        yield _constant_landing(value, box, far, far_strides, conversions)


def _resolve_write(
    written: Write, box: Box, far: int, far_strides: tuple[int, ...], conversions: tuple[Conversion, ...]
) -> Iterator[Landing]:
    if isinstance(written.source, Constant):
        value = _inside(written.source.value, box, written.box)
        yield _constant_landing(value, box, far, far_strides, conversions)
        return
    near = written.offset + _distance(box, written.box, written.strides)
    axes = [Axis(n, a, b) for n, a, b in zip(box.shape, written.strides, far_strides, strict=True)]
    yield from resolve(written.source, near, far, axes, written.conversions + conversions)


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
