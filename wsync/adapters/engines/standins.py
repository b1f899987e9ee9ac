"""Stand-ins: tensors that carry no data but know, element by element, which checkpoint tensor they come from.

A stand-in is a strided view of a source. The torch side sees a tensor of the right shape, strides and dtype whose twin
lives on the meta device, so that every view composes by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
from wsync.adapters.engines.strided import Axis, box_runs
from wsync.errors import RecordError
from wsync.spec.box import contiguous_strides


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
        RecordError: ``dst`` is live memory.
    """
    buffer = dst.source.memory() if isinstance(dst.source, Part) else dst.source
    if isinstance(buffer.background, Initial):
        raise RecordError(f"the loader writes the engine's {buffer.background.name!r} in a way that is not followed")
    if isinstance(src, Constant):
        _write_constant(buffer, dst, src)
        return
    if isinstance(src, Computed):
        buffer.names |= src.names
        far = whole_view(buffer, dst.shape)
        for run in box_runs(buffer.shape, dst.offset, 0, axes_of(dst, far)):
            buffer.wrote(Write(run.box, src))
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
    after: int | None = None,
) -> None:
    """Append a copy out of ``source``, as it is now or ``after`` its first so many writes, to a buffer's writes."""
    after = num_writes(source) if after is None else after
    for run in box_runs(buffer.shape, near_offset, far_offset, axes):
        buffer.wrote(Write(run.box, source, run.offset, run.strides, conversions, after))
    buffer.names |= source.names


def note_constant(buffer: Buffer, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], value: Any) -> None:
    """Append a constant, 0-d or of ``shape`` and in the buffer's dtype, to a buffer's writes."""
    value = value.contiguous()
    axes = [Axis(n, a, b) for n, a, b in zip(shape, strides, contiguous_strides(shape), strict=True)]
    for run in box_runs(buffer.shape, offset, 0, axes):
        # The value may itself be a view.
        start = int(value.storage_offset()) + run.offset
        inside = value.as_strided(run.box.shape, run.strides, start) if value.dim() else value
        buffer.wrote(Write(run.box, Constant(inside.clone())))


def _write_constant(buffer: Buffer, dst: StridedView, constant: Constant) -> None:
    value = constant.value.expand(dst.shape) if constant.value.dim() else constant.value
    note_constant(buffer, dst.offset, dst.shape, dst.strides, value.to(dst.dtype).view(buffer.dtype))


def axes_of(near: StridedView, far: StridedView) -> list[Axis]:
    """The axes of a copy between two views of one shape."""
    return [Axis(n, a, b) for n, a, b in zip(near.shape, near.strides, far.strides, strict=True)]
