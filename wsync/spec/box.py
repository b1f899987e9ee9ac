"""Box: an N-d interval of a tensor."""

from __future__ import annotations

import math

import msgspec


class Box(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """An N-d interval: ``offset[d] <= index[d] < offset[d] + shape[d]``, in elements.

    A 0-d tensor has the box ``Box((), ())`` with one element.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        """How many elements are inside; 0 for an empty box, 1 for a 0-d one."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first index behind the box, in each dimension."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where it is empty."""
        offset = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        end = tuple(min(a, b) for a, b in zip(self.end, other.end, strict=True))
        if any(e <= o for o, e in zip(offset, end, strict=True)):
            return None
        return Box(offset, tuple(e - o for o, e in zip(offset, end, strict=True)))

    def contains(self, other: Box) -> bool:
        """Whether every element of ``other`` is inside."""
        return other.num_elements == 0 or self.intersect(other) == other

    def shifted(self, by: tuple[int, ...]) -> Box:
        """The same extent with ``by`` added to the offset."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)

    def relative_to(self, origin: Box) -> Box:
        """The same box in coordinates that start at ``origin``."""
        return Box(tuple(o - b for o, b in zip(self.offset, origin.offset, strict=True)), self.shape)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of ``shape``, in elements."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
