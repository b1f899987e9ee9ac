"""The elements of a strided tensor that an index picks. Pure NumPy: indices are the loader's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wsync.adapters.engines.runs import Offsets

Entry = np.ndarray[Any, np.dtype[Any]]

Index = list[Entry | None]
"""One entry for each leading dimension: whole numbers, or None for all of it. Entries broadcast together."""


class Places(NamedTuple):
    """Elements of a strided tensor, as an index picks them.

    Attributes:
        shape: of what is picked; the index makes the ``num_dims`` dimensions from ``at`` on.
        at, num_dims: which they are.
        offsets: elements from the tensor's first one `[N]`, for each place of the index in row-major order.
        unit: distance of neighbours along the last dimension that is indexed.
        strides: of the other dimensions of ``shape``.
    """

    shape: tuple[int, ...]
    at: int
    num_dims: int
    offsets: Offsets
    unit: int
    strides: tuple[int, ...]

    @property
    def rest(self) -> tuple[int, ...]:
        """The extents that the index does not make."""
        return self.shape[: self.at] + self.shape[self.at + self.num_dims :]


def picked(shape: Sequence[int], strides: Sequence[int], index: Index) -> Places:
    """The elements that an index picks of a strided tensor, in the order in which torch returns them.

    Raises:
        IndexError: the index names an element that is not there.
    """
    dims = [d for d, entry in enumerate(index) if entry is not None]
    entries = {d: np.asarray(index[d]).astype(np.int64) for d in dims}
    made = np.broadcast_shapes(*(e.shape for e in entries.values()))
    offsets = np.zeros(made, dtype=np.int64)
    for d, entry in entries.items():
        if entry.size and (entry.min() < -shape[d] or entry.max() >= shape[d]):
            outside = int(entry.min() if entry.min() < -shape[d] else entry.max())
            raise IndexError(f"index {outside} is out of bounds for dimension {d} with size {shape[d]}")
        offsets += np.where(entry < 0, entry + shape[d], entry) * strides[d]
    # As in torch: indices that stand together stay where they are, others come first.
    at = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    others = [d for d in range(len(shape)) if d not in entries]
    extents = [shape[d] for d in others]
    result = (*extents[:at], *made, *extents[at:])
    return Places(result, at, len(made), offsets.ravel(), strides[dims[-1]], tuple(strides[d] for d in others))


def all_of(strides: Sequence[int], like: Places) -> Places:
    """Every element of a tensor that has the shape of what was picked, in the same order."""
    dims = range(like.at, like.at + like.num_dims)
    offsets = np.zeros((), dtype=np.int64)
    for d in dims:
        offsets = offsets[..., None] + np.arange(like.shape[d], dtype=np.int64) * strides[d]
    others = tuple(s for d, s in enumerate(strides) if d not in dims)
    return like._replace(offsets=offsets.ravel(), unit=strides[dims[-1]] if dims else 0, strides=others)


def along(shape: Sequence[int], entries: Mapping[int, Entry]) -> Index:
    """The index that takes ``entries[dim]`` along each such dimension by itself, so that every dimension stays."""
    first, last = min(entries), max(entries)
    index: Index = [None] * first
    for d in range(first, last + 1):
        entry = entries.get(d, np.arange(shape[d]))
        index.append(entry.reshape([-1 if k == d else 1 for k in range(first, last + 1)]))
    return index


def along_one(index: Entry, dim: int) -> Index:
    """The index of ``gather``: like ``index`` along one dimension, and the same place in the others."""
    if not index.ndim:
        return [index]
    own: Index = [
        np.arange(n).reshape([-1 if k == d else 1 for k in range(index.ndim)]) for d, n in enumerate(index.shape)
    ]
    own[dim % index.ndim] = index
    return own


def of_mask(mask: Entry, shape: Sequence[int]) -> Index:
    """The index of the elements where a mask that broadcasts to ``shape`` is set.

    Raises:
        ValueError: it does not broadcast.
    """
    return list(np.nonzero(np.broadcast_to(mask, tuple(shape))))
