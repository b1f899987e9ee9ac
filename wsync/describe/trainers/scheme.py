"""What every trainer layout gives: who holds which boxes of a tensor."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

from wsync.describe.layout import Degrees
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import EMBEDDING, HEAD, OTHER, Part
from wsync.errors import ManifestError
from wsync.spec.box import Box
from wsync.spec.manifest import TensorSpec

Shards = tuple[tuple[Box, ...], ...]
"""For each rank the boxes that it holds of one tensor."""


class Scheme(Protocol):
    """One layout of one model over the ranks."""

    def key(self, tensor: TensorSpec, part: Part) -> Hashable:
        """Equal for tensors that are laid out alike."""

    def shards(self, tensor: TensorSpec, part: Part) -> Shards:
        """Who holds what.

        Raises:
            ConfigError: the layout does not divide it, or does not say.
        """


class Layers:
    """Which pipeline stage holds which layer.

    Args:
        model: whose layers they are.
        stages: the stage of each layer.
        num_stages: how many there are.
    """

    def __init__(self, model: ModelShape, stages: list[int], num_stages: int) -> None:
        self.stages = stages
        self.num_stages = num_stages
        self.tied = {t.alias_of for t in model.tensors if t.alias_of is not None}

    def of(self, tensor: TensorSpec, part: Part) -> tuple[int, ...]:
        """The stages that hold a tensor: one, or two for an embedding that is also the output layer.

        Raises:
            ManifestError: the tensor is in no layer, and its name does not say which end of the model it is at.
        """
        last = self.num_stages - 1
        if part.layer is not None:
            return (self.stages[part.layer] if part.layer < len(self.stages) else last,)
        if part.kind == EMBEDDING:
            return tuple(sorted({0, last})) if tensor.name in self.tied else (0,)
        if part.kind == OTHER and last:
            raise ManifestError(
                f"tensor {tensor.name!r} is in no layer, and pp={self.num_stages} does not say which stage holds it",
                hint="leave pp out of the layout",
            )
        return (last,) if part.kind == HEAD or last else (0,)


def num_layers(model: ModelShape) -> int:
    """Layers of the decoder, those that predict further tokens left out."""
    from wsync.describe.parts import part_of

    if model.facts is not None:
        return model.facts.layers
    found = [part.layer for part in (part_of(t.name) for t in model.tensors) if part.layer is not None]
    return max(found, default=-1) + 1


Keys = Mapping[str, str]
"""The keys of a layout -> what each means."""

__all__ = ["Degrees", "Keys", "Layers", "Scheme", "Shards", "num_layers"]
