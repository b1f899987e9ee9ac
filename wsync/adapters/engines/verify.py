"""Checks a recording by coded values: the engine's loader and the recorded copies must leave the same live bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from wsync.adapters.engines.recorder import LoadWeights, Recording
from wsync.errors import RecordError
from wsync.spec.manifest import TensorSpec
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


@torch.no_grad()
def replay(recording: Recording, part_of: Callable[[str, str], torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Execute a recording with plain torch: its constants, then its copies.

    Args:
        part_of: gives the part of a checkpoint name and a role (``"weight"`` or ``"scale"``).
        targets: a flat tensor for each storage of the recording.
    """
    for constant in recording.constants:
        target = targets[constant.storage_idx]
        offset = int(target.storage_offset()) + constant.dst_offset
        target.as_strided(constant.shape, constant.dst_strides, offset).copy_(constant.value)
    for c in recording.copies:
        source = part_of(c.tensor, c.role)
        for dim, (start, extent) in enumerate(zip(c.box.offset, c.box.shape, strict=True)):
            source = source.narrow(dim, start, extent)
        target = targets[c.storage_idx]
        place = target.as_strided(c.box.shape, c.dst_strides, int(target.storage_offset()) + c.dst_offset)
        place.view(_BITS[place.element_size()]).copy_(source.view(_BITS[source.element_size()]))


@torch.no_grad()
def verify_recording(recording: Recording, load_weights: LoadWeights, name_table: Sequence[TensorSpec]) -> None:
    """Run the loader on coded values, compare with the recorded copies, and restore the live bytes.

    The engine must not generate meanwhile. Takes memory for two more copies of the live weights.

    Raises:
        RecordError: live bytes differ; names the live tensor and how many bytes of it.
    """
    live = [recording.storage_view(i) for i in range(len(recording.storages))]
    before = [t.clone() for t in live]
    try:
        load_weights(_coded_checkpoint(recording, name_table))
        after = [t.clone() for t in live]
    finally:
        for target, saved in zip(live, before, strict=True):
            target.copy_(saved)
    specs = {spec.name: spec for spec in name_table}

    def part_of(name: str, role: str) -> torch.Tensor:
        spec = specs[name]
        parts = recipe_parts(spec.name, spec.shape, spec.dtype, recording.recipes[name])
        return next(coded_tensor(p.name, p.shape, p.dtype) for p in parts if p.role == role)

    replay(recording, part_of, before)
    for storage, loaded, replayed in zip(recording.storages, after, before, strict=True):
        different = int((loaded.view(torch.uint8) != replayed.view(torch.uint8)).sum())
        if different:
            raise RecordError(
                f"the recorded copies and the engine's loader leave different bytes in {storage.name!r}: "
                f"{different} of {loaded.numel() * loaded.element_size()}"
            )


def _coded_checkpoint(recording: Recording, name_table: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in name_table:
        recipe = recording.recipes.get(spec.name, recording.offered[spec.name])
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipe):
            yield part.name, coded_tensor(part.name, part.shape, part.dtype)
