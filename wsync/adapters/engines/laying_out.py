"""Kernel layouts of the sink: engines that swizzle, shuffle, pack or pad a tensor after loading, in a known way.

The loader fills the plain tensor, which is scratch memory here; the commit writes the engine's own memory from it, as
`wsync.plan.layouts` describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from wsync import kernels
from wsync.adapters.engines.recorder import Recording
from wsync.errors import CommitError, ConfigError, DigestError, StateError
from wsync.plan.descriptors import UNPACK_EXPONENT
from wsync.plan.layouts import Layout
from wsync.plan.strided import digest_words_of, unpack_descs
from wsync.session.laststep import LastSteps, Repack
from wsync.spec.dtypes import itemsize

_MAX_FILL_BYTES = 4
_EXPONENT_BITS = 0x7F800000

Layouts = Mapping[str, tuple[Layout, torch.Tensor]]
"""Name of a tensor that the loader fills -> its layout in the engine's memory, and that memory."""


def with_layouts(recording: Recording, steps: LastSteps, layouts: Layouts, num_threads: int) -> LastSteps:
    """Last steps that also write the engine's memory from the plain tensors of these names.

    Args:
        recording: of the loader.
        steps: that come first; they may be what fills a plain tensor.
        layouts: by the engine's name of the plain tensor.
        num_threads: of the unpack kernel.

    Raises:
        ConfigError: the loader fills no tensor of that name, or the memory does not have the layout's size.
    """
    index = {spec.name: i for i, spec in enumerate(recording.storages[: len(recording.coverage.storages)])}
    added = []
    for name, (layout, memory) in layouts.items():
        if name not in index:
            raise ConfigError(f"layouts names {name!r}, none of the {len(index)} tensors that the loader fills")
        added.append(_laid_out(recording, index[name], layout, memory, num_threads))
    return replace(steps, repacks=(*steps.repacks, *added))


def _laid_out(recording: Recording, idx: int, layout: Layout, memory: torch.Tensor, num_threads: int) -> Repack:
    spec, plain = recording.storages[idx], recording.storage_view(idx)
    _check_fits(recording, idx, layout, memory)
    copies, fills = layout.copies(), layout.fills()
    elem_bytes = 1 if layout.op == UNPACK_EXPONENT else itemsize(spec.dtype)
    address = memory.data_ptr()
    descs = unpack_descs([*copies, *fills], address, 0, 0, elem_bytes)
    read_back = digest_words_of([*copies, *fills], elem_bytes) > 0

    def commit() -> None:
        nonlocal read_back
        if memory.data_ptr() != address:
            raise StateError(f"the memory of {spec.name!r} moved from {address:#x} to {memory.data_ptr():#x}")
        if layout.op == UNPACK_EXPONENT and bool((plain.contiguous().view(torch.int32) & ~_EXPONENT_BITS).any()):
            raise CommitError(
                f"scales of {spec.name!r} are no powers of two",
                hint="requantise them (transforms), or use the recipe 'fp8_block128'",
            )
        written = kernels.unpack(descs, plain.data_ptr(), num_threads)
        if read_back and kernels.installed_digest(descs, num_threads) != written:
            raise DigestError(f"what was laid out of {spec.name!r} is not what lies in the engine's memory")
        read_back = False

    return Repack(spec.name, frozenset([idx]), prepare=_nothing, commit=commit)


def _check_fits(recording: Recording, idx: int, layout: Layout, memory: torch.Tensor) -> None:
    spec = recording.storages[idx]
    shape = recording.storage_shape(idx)
    if tuple(shape) != tuple(layout.shape):
        raise ConfigError(f"the layout of {spec.name!r} is one of {layout.shape}, but the loader fills {shape}")
    plain_bytes = itemsize(spec.dtype)
    if plain_bytes > _MAX_FILL_BYTES and layout.fills():
        raise ConfigError(
            f"the layout of {spec.name!r} pads elements of {plain_bytes} bytes, at most {_MAX_FILL_BYTES} can be filled"
        )
    if layout.op == UNPACK_EXPONENT:
        if spec.dtype != "float32":
            raise ConfigError(f"exponents are those of float32, but {spec.name!r} is {spec.dtype}")
        plain_bytes = 1
    needed = layout.num_elements * plain_bytes
    held = memory.untyped_storage().nbytes() - memory.storage_offset() * memory.element_size()
    if memory.device.type != "cpu" or held < needed:
        raise ConfigError(
            f"the layout of {spec.name!r} takes {needed} bytes of CPU memory, but its memory on {memory.device} has "
            f"{held}"
        )
    begin, end = memory.data_ptr(), memory.data_ptr() + needed
    for other, at in zip(recording.storages, recording.memory, strict=True):
        if begin < at.address + other.num_elements * itemsize(other.dtype) and at.address < end:
            raise ConfigError(
                f"the layout of {spec.name!r} writes the memory of {other.name!r}, which the loader fills",
                hint="give the loader a tensor of its own for the plain form",
            )


def _nothing() -> None:
    """Scratch memory is all that a layout prepares."""
