"""Where values come from: checkpoint tensors, constants, and memory that remembers what was written where.

A `Buffer` is memory that the loader allocated (a clone, a concatenation), or live memory that it reads. A copy out of
a buffer remembers how much had been written to it by then, so that memory may be used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from wsync.adapters.engines.boxindex import BoxIndex
from wsync.spec.box import Box
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
        overwritten: its memory, once the loader wrote into it (ranks that zero a bias which others add).
    """

    def __init__(self, spec: TensorSpec, part: PartSpec, recipe: str) -> None:
        self.spec = spec
        self.part = part
        self.recipe = recipe
        self.dtype: torch.dtype = getattr(torch, part.dtype)
        self.shape = part.shape
        self.overwritten: Buffer | None = None

    @property
    def names(self) -> set[str]:
        """The checkpoint tensors that this is made of."""
        return {self.part.name} if self.overwritten is None else self.overwritten.names

    @property
    def computed(self) -> str:
        """The first operation that computed something in its memory, or empty."""
        return "" if self.overwritten is None else self.overwritten.computed

    def memory(self) -> Buffer:
        """Its memory, to write into."""
        if self.overwritten is None:
            self.overwritten = Buffer(self.shape, self.dtype, self)
        return self.overwritten


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
        num_writes: how often the source had been written by then.
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
        background: what it holds where nothing was written: a 0-d constant, a tensor of ``shape``, a checkpoint tensor,
            the bytes that live memory held before, or None (nothing).
        writes: in order of time; later ones hide earlier ones. Appended to by `wrote` alone.
        names: the tensors that it is or was made of.
        computed: the first operation that computed something in it, or empty.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, background: torch.Tensor | Part | Initial | None = None
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self.background = background
        self.writes: list[Write] = []
        self.names: set[str] = set()
        if isinstance(background, Initial):
            self.names = {background.name}
        elif isinstance(background, Part):
            self.names = {background.part.name}
        self.computed = ""
        self._places = BoxIndex()

    def wrote(self, write: Write) -> None:
        """Append a write."""
        if isinstance(write.source, Computed):
            self.computed = self.computed or write.source.operation
        self.writes.append(write)
        self._places.append(write.box)

    def is_written(self, box: Box) -> bool:
        """Whether an element of a box was written."""
        return bool(self._places.meeting(box))

    def holds(self, box: Box, num_writes: int) -> Iterator[tuple[Box, Write | None]]:
        """Cut a box into parts that do not overlap, each with what it held after so many writes; None: background."""
        for part, number in self._places.latest(box, num_writes):
            yield part, None if number is None else self.writes[number]


Origin = Part | Buffer


def num_writes(source: Origin) -> int:
    """How often the memory of a source was written so far."""
    if isinstance(source, Part):
        return 0 if source.overwritten is None else len(source.overwritten.writes)
    return len(source.writes)
