"""What all rows share: the parts that travel, and the shape of a row."""

from __future__ import annotations

from typing import Protocol

import msgspec
import torch

from wsync.bench.spans import Recorder, Span
from wsync.spec.recipes import PartSpec, recipe_parts


class Outcome(msgspec.Struct, frozen=True):
    """What one rank reports of one repeat, next to its spans.

    Attributes:
        released_s: when a trainer could write its weights again, on `time.monotonic`; 0 on engines.
        pause_s: seconds in which an engine could not serve.
        wire_bytes: that this rank sent towards the engines.
        remote_spans: of other ranks, where this rank learns them.
    """

    released_s: float = 0.0
    pause_s: float = 0.0
    wire_bytes: int = 0
    remote_spans: dict[str, list[Span]] = msgspec.field(default_factory=dict)


class Row(Protocol):
    """One side of one way to move the weights."""

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Publish (trainer) or take over (engine) one version. All ranks start together."""

    def tidy(self) -> None:
        """After all ranks have finished a version, outside of what is timed."""

    def close(self) -> None:
        """Give back what the row holds."""


def all_parts(shapes: list[tuple[str, list[int], str]], recipes: dict[str, str]) -> list[PartSpec]:
    """The parts of the whole model, in the order in which the trainers gather."""
    parts: list[PartSpec] = []
    for name, shape, dtype in shapes:
        parts.extend(recipe_parts(name, tuple(shape), dtype, recipes[name]))
    return parts


def empty_part(part: PartSpec) -> torch.Tensor:
    """A tensor for the part, its pages not touched."""
    dtype: torch.dtype = getattr(torch, part.dtype)
    return torch.empty(part.shape, dtype=dtype)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, flat, without a copy (``tensor`` is contiguous)."""
    return tensor.reshape(-1).view(torch.uint8)
