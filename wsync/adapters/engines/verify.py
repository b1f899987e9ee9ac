"""Checks a recording by coded values: the engine's loader and the recorded copies must leave the same live bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from wsync.adapters.engines.events import LiveConstant
from wsync.adapters.engines.offering import LoadWeights
from wsync.adapters.engines.recorder import Recording
from wsync.errors import RecordError
from wsync.spec.manifest import CopySpec, TensorSpec
from wsync.spec.recipes import recipe_parts

_NUM_CODES = 113
"""Different values: a prime, so that no stride of a layout repeats them; all exact in e4m3, bf16 and above."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def coded_tensor(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Values that tell an element's place: a mix of its index and the name, exact in every dtype."""
    count = int(torch.Size(shape).numel())
    start = sum((i + 1) * b for i, b in enumerate(name.encode()))
    mixed = (torch.arange(count, dtype=torch.int64) + start) * 2654435761 // 4096 % _NUM_CODES
    kind: torch.dtype = getattr(torch, dtype)
    # One-byte floats take the code as their bits: positive and finite, and no two codes round to one value.
    values = mixed.to(torch.uint8).view(kind) if kind.itemsize == 1 and kind.is_floating_point else mixed.to(kind)
    return values.reshape(shape)


PartOf = Callable[[str, str], torch.Tensor]
"""Gives the part of a checkpoint name and a role (``"weight"``, ``"scale"`` or ``"scale_2"``)."""


@torch.no_grad()
def replay(recording: Recording, part_of: PartOf, targets: Sequence[torch.Tensor]) -> None:
    """Execute a recording with plain torch: its constants, its copies, then its widenings.

    Args:
        part_of: gives checkpoint tensors.
        targets: a flat tensor for each storage of the recording, those of scratch memory included.
    """
    for storage_idx, target in enumerate(targets):
        constants = [c for c in recording.constants if c.storage_idx == storage_idx]
        _replay(target, constants, [c for c in recording.copies if c.storage_idx == storage_idx], part_of)
    written = {c.storage_idx for c in recording.copies}
    for one in recording.widened:
        if one.scratch_idx in written:
            one.write(targets[one.scratch_idx], targets[one.live_idx])


@torch.no_grad()
def replay_storage(recording: Recording, storage_idx: int, target: torch.Tensor, part_of: PartOf) -> None:
    """Execute all that ends up in one live storage, with what is widened into it, on a flat tensor like it."""
    into = defaultdict(list)
    for c in recording.copies:
        into[c.storage_idx].append(c)
    _replay(target, [c for c in recording.constants if c.storage_idx == storage_idx], into[storage_idx], part_of)
    for one in recording.widened:
        if one.live_idx == storage_idx:
            narrow = torch.empty_like(one.scratch)
            _replay(narrow, (), into[one.scratch_idx], part_of)
            one.write(narrow, target)


def _replay(
    target: torch.Tensor,
    constants: Iterable[LiveConstant],
    copies: Iterable[CopySpec],
    part_of: PartOf,
) -> None:
    start = int(target.storage_offset())
    for constant in constants:
        constant.write(target)
    for c in copies:
        source = part_of(c.tensor, c.role)
        for dim, (first, extent) in enumerate(zip(c.box.offset, c.box.shape, strict=True)):
            source = source.narrow(dim, first, extent)
        place = target.as_strided(c.box.shape, c.dst_strides, start + c.dst_offset)
        place.view(_BITS[place.element_size()]).copy_(source.view(_BITS[source.element_size()]))


@torch.no_grad()
def verify_recording(recording: Recording, load_weights: LoadWeights, name_table: Sequence[TensorSpec]) -> None:
    """Run the loader on coded values, compare with the recorded copies, and restore every live byte.

    The engine must not generate meanwhile. Takes memory for one more copy of the live weights and buffers, and for one
    more storage. Live memory has its bytes and its addresses again when this returns or raises.

    Raises:
        RecordError: live bytes differ; names the live tensor and how many bytes of it.
    """
    views = recording.live_views()
    before = [live.clone() for _, live, _ in views]
    try:
        with recording.kept():
            load_weights(_coded_checkpoint(recording, name_table))
        _compare(recording, name_table, before)
    finally:
        for (_, live, _), saved in zip(views, before, strict=True):
            _bytes(live).copy_(_bytes(saved))


def _compare(recording: Recording, name_table: Sequence[TensorSpec], before: Sequence[torch.Tensor]) -> None:
    """Check that live memory is what was there before, with the recorded copies executed."""
    specs = {spec.name: spec for spec in name_table}

    def part_of(name: str, role: str) -> torch.Tensor:
        spec = specs[name]
        parts = recipe_parts(spec.name, spec.shape, spec.dtype, recording.recipes[name])
        return next(coded_tensor(p.name, p.shape, p.dtype) for p in parts if p.role == role)

    for (name, live, storage_idx), saved in zip(recording.live_views(), before, strict=True):
        expected = saved.clone()
        if storage_idx is not None:
            replay_storage(recording, storage_idx, expected, part_of)
        if different := int((_bytes(live) != _bytes(expected)).sum()):
            raise RecordError(
                f"the recorded copies and the engine's loader leave different bytes in {name!r}: "
                f"{different} of {live.numel() * live.element_size()}"
            )


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)


def _coded_checkpoint(recording: Recording, name_table: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in name_table:
        recipe = recording.recipes.get(spec.name, recording.offered[spec.name])
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipe):
            yield part.name, coded_tensor(part.name, part.shape, part.dtype)
