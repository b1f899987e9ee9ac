"""Weights that an engine holds in a wider dtype than its checkpoint: they wait in scratch memory for the commit.

Every value of the narrower dtype has one image in the wider one, so nothing is rounded. What is received and verified
are the checkpoint's own bytes; the conversion is the last step, on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from wsync.plan.program import StorageMemory
from wsync.session.laststep import LastSteps, Repack
from wsync.spec.manifest import StorageSpec

WIDER: dict[torch.dtype, frozenset[torch.dtype]] = {
    torch.bfloat16: frozenset({torch.float32, torch.float64}),
    torch.float16: frozenset({torch.float32, torch.float64}),
    torch.float8_e4m3fn: frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64}),
    torch.float32: frozenset({torch.float64}),
}
"""Dtypes that hold every value of another one, so that there and back changes nothing."""

WIDENED = frozenset({torch.bfloat16, torch.float16, torch.float32})
"""Dtypes that a commit widens. Not e4m3: a weight without its scales is no weight."""


class Region(NamedTuple):
    """A piece of one live storage that is widened.

    Attributes:
        dtype: that the values arrive in.
        first: element of the live storage that it begins at.
        num_elements: up to its last element.
        places: offset into the region, shape and strides in elements of what is widened, none twice.
        elements: how many that are.
    """

    dtype: torch.dtype
    first: int
    num_elements: int
    places: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    elements: int


def region_of(dtype: torch.dtype, places: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> Region:
    """The region of live elements that arrive in ``dtype``; places by element of the storage, none of them empty."""
    ends = [offset + 1 + sum((n - 1) * s for n, s in zip(shape, st, strict=True)) for offset, shape, st in places]
    first, last = min(offset for offset, *_ in places), max(ends)
    elements = sum(torch.Size(shape).numel() for _, shape, _ in places)
    if elements == last - first:
        return Region(dtype, first, elements, ((0, (elements,), (1,)),), elements)
    moved = tuple((offset - first, shape, strides) for offset, shape, strides in places)
    return Region(dtype, first, last - first, moved, elements)


@dataclass(frozen=True)
class Widening:
    """Live elements that arrive in a narrower dtype.

    Attributes:
        name: of the live tensor.
        scratch_idx: the recording's storage that the copies fill instead.
        live_idx: the recording's storage that it is widened into.
        region: which elements of it.
    """

    name: str
    scratch_idx: int
    live_idx: int
    region: Region
    _scratch: torch.Tensor = field(repr=False)
    _live: torch.Tensor = field(repr=False)

    @property
    def scratch(self) -> torch.Tensor:
        """Its own memory `[region.num_elements]`, in the narrower dtype."""
        return self._scratch

    def spec(self) -> StorageSpec:
        """The scratch memory as a storage of the manifest."""
        dtype = _dtype_name(self.region.dtype)
        return StorageSpec(f"{self.name} as {dtype}", dtype, self.region.num_elements)

    def memory(self) -> StorageMemory:
        """Where the scratch memory lies."""
        return StorageMemory(self._scratch.data_ptr(), self.region.num_elements, _dtype_name(self.region.dtype))

    def widen(self) -> None:
        """Convert what scratch memory holds into live memory. On the engine's thread, between steps."""
        self.write(self._scratch, self._live)

    @torch.no_grad()
    def write(self, scratch: torch.Tensor, live: torch.Tensor) -> None:
        """Convert from memory like the scratch memory into memory like the live storage, both flat."""
        for offset, shape, strides in self.region.places:
            source = scratch.as_strided(shape, strides, int(scratch.storage_offset()) + offset)
            start = int(live.storage_offset()) + self.region.first + offset
            live.as_strided(shape, strides, start).copy_(source)


def with_widenings(steps: LastSteps, widenings: Collection[Widening]) -> LastSteps:
    """The last steps of an engine, with those of its widenings.

    Where an engine repacks what is widened, it is widened in that repack's scratch memory, before the engine's own
    preparation; otherwise at the commit.
    """
    repacks = list(steps.repacks)
    for one in widenings:
        for i, repack in enumerate(repacks):
            if one.live_idx in repack.storages:
                repacks[i] = _before(one, repack)
                break
        else:
            repacks.append(Repack(one.name, frozenset([one.scratch_idx]), prepare=_nothing, commit=one.widen))
    return replace(steps, repacks=tuple(repacks))


def _before(one: Widening, repack: Repack) -> Repack:
    def prepare() -> None:
        one.widen()
        repack.prepare()

    return replace(repack, storages=repack.storages | {one.scratch_idx}, prepare=prepare)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nothing() -> None:
    """Scratch memory is all that a widening prepares."""
