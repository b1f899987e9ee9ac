"""DeepSpeed ZeRO-3: every rank holds an equal range of each flattened, padded tensor.

Source: DeepSpeed ``partition_parameters.py``, ``_aligned_size`` and ``_partition_param``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from wsync.describe.layout import Degrees
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import Part
from wsync.describe.trainers.boxes import flat_range
from wsync.describe.trainers.scheme import Keys, Shards
from wsync.spec.manifest import TensorSpec

KEYS: Keys = {
    "zero3": "ranks that share every flattened tensor",
    "replicate": "copies of the sharded model (MiCS, hpZ)",
}


class Zero3:
    """One model over ranks that share flat ranges.

    Raises:
        ConfigError: degrees that are not the world.
    """

    def __init__(self, model: ModelShape, degrees: Degrees, world: int) -> None:
        self.ranks, self.replicate = degrees.number("zero3"), degrees.number("replicate")
        degrees.check_world(world, num_ranks(degrees), "zero3 * replicate")

    def key(self, tensor: TensorSpec, part: Part) -> Hashable:
        """Equal for tensors that are laid out alike."""
        return tensor.shape

    def shards(self, tensor: TensorSpec, part: Part) -> Shards:
        """Who holds what; the padding is nobody's."""
        each = -(-math.prod(tensor.shape) // self.ranks)
        return tuple(flat_range(tensor.shape, r * each, (r + 1) * each) for r in range(self.ranks)) * self.replicate


def num_ranks(degrees: Degrees) -> int:
    """The world of a layout."""
    return degrees.number("zero3") * degrees.number("replicate")
