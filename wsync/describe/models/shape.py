"""A model without its weights."""

from __future__ import annotations

import math

import msgspec

from wsync.describe.models.facts import Facts
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import TensorSpec


class ModelShape(msgspec.Struct, frozen=True):
    """Names and shapes of a model's checkpoint.

    Attributes:
        name: of the model.
        tensors: all of them, by their names in the checkpoint.
        source: where the facts are from: an address, or a path.
        facts: its architecture; None where only names and shapes are known, which layouts that cut heads need.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    source: str
    facts: Facts | None = None

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, tied ones once."""
        return sum(math.prod(t.shape) for t in self.tensors if t.alias_of is None)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of the tensors of each dtype, tied ones once."""
        found: dict[str, int] = {}
        for t in self.tensors:
            if t.alias_of is None:
                found[t.dtype] = found.get(t.dtype, 0) + math.prod(t.shape) * itemsize(t.dtype)
        return dict(sorted(found.items()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        return sum(self.bytes_by_dtype.values())
