"""Operations that pick places by plain indices: copies of rows, however many they pick.

All of them are one of two: a gather copies what an index picks into new memory, a scatter copies into what it picks.
The index must be known: the loader's own numbers, or a table of the engine that no checkpoint changes. Neighbouring
places are one row, rows of equal length and distance are one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from wsync.adapters.engines.places import Entry, Index, Places, all_of, along, along_one, of_mask, picked
from wsync.adapters.engines.runs import runs_of
from wsync.adapters.engines.standins import StandIn, buffer_like
from wsync.adapters.engines.strided import MAX_RUNS
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.adapters.engines.twins import filled, on_meta, piece
from wsync.errors import RecordError

aten = torch.ops.aten

Given = dict[str, Any]
"""The arguments of an operation by the names of its schema."""


class IndexedMoves:
    """Handlers of operations that index. They return NotImplemented for an index whose values are not known.

    Args:
        memory: what is followed.
    """

    def __init__(self, memory: TrackedMemory) -> None:
        self.memory = memory

    def handlers(self) -> dict[Any, Callable[..., Any]]:
        """By operation."""
        gathers: dict[Any, Callable[[Given], Index | None]] = {
            aten.index: self._of_index,
            aten.index_select: self._of_rows,
            aten.gather: self._of_gather,
            aten.take: self._of_take,
            aten.masked_select: self._of_mask,
            aten.embedding: self._of_embedding,
            aten.flip: _of_flip,
            aten.roll: _of_roll,
        }
        scatters: list[tuple[Any, Any, Callable[[Given], Index | None], str]] = [
            (aten.index_put, aten.index_put_, self._of_index, "values"),
            (aten.index_copy, aten.index_copy_, self._of_rows, "source"),
            (aten.index_fill, aten.index_fill_, self._of_rows, "value"),
            (aten.masked_fill, aten.masked_fill_, self._of_mask, "value"),
            (aten.scatter, aten.scatter_, self._of_gather, "src"),
        ]
        found = {op: self._gathering(index_of) for op, index_of in gathers.items()}
        for op, in_place, index_of, values in scatters:
            found[op] = self._scattering(index_of, values, clones=True)
            found[in_place] = self._scattering(index_of, values, clones=False)
        found[aten._index_put_impl_] = found[aten.index_put_]
        found[aten.where] = self._where
        return found

    def _gathering(self, index_of: Callable[[Given], Index | None]) -> Callable[..., Any]:
        def gather(func: Any, args: Any, kwargs: Any) -> Any:
            given = _bound(func, args, kwargs)
            src = given["self"] if "self" in given else given["weight"]
            index = index_of(given) if src.dim() else None
            if index is None:
                return NotImplemented
            places = picked(src.shape, src.stride(), index)
            out = buffer_like(torch.empty(places.shape, dtype=src.dtype, device="meta"))
            self._copy(func, out, all_of(out.stride(), places), src, places)
            return out

        return gather

    def _scattering(self, index_of: Callable[[Given], Index | None], key: str, *, clones: bool) -> Callable[..., Any]:
        def scatter(func: Any, args: Any, kwargs: Any) -> Any:
            given = _bound(func, args, kwargs)
            dst, values = given["self"], given.get(key, given.get("value"))
            reduces = given.get("accumulate") or "reduce" in given
            index = index_of(given) if dst.dim() and not reduces else None
            if index is None:
                return NotImplemented
            if clones:
                dst = filled(self.memory, out := buffer_like(_empty_like(dst)), [(out.twin, dst)])
            self._scatter(func, dst, index, values)
            return dst

        return scatter

    def _scatter(self, func: Any, dst: torch.Tensor, index: Index, values: Any) -> None:
        literal = not isinstance(values, torch.Tensor) or not (values.dim() or self.memory.is_followed(values))
        if not isinstance(values, torch.Tensor):
            values = torch.tensor(values, dtype=torch.float64 if isinstance(values, float) else None)
        if values.dim() and values.dtype != dst.dtype:
            raise RuntimeError(f"{func} takes values of {dst.dtype}, got {values.dtype}")
        places = picked(dst.shape, dst.stride(), index)
        if func.overloadpacket in (aten.scatter, aten.scatter_) and values.dim():
            # The source may be larger than the index.
            values = piece(values, 0, places.shape, values.stride())
        single = values.numel() == 1
        values = _expanded(values, places.shape)
        source = all_of(values.stride(), places)
        # In the order of memory, whatever the order of the index: neighbours become rows.
        order = np.argsort(places.offsets, kind="stable")
        places, source = (p._replace(offsets=p.offsets[order]) for p in (places, source))
        twice = np.flatnonzero(np.diff(places.offsets) == 0)
        if len(twice) and not single:
            raise RecordError(
                f"the loader writes with {func} and an index that names a place twice; which value of "
                f"{self.memory.said([values])} stays is not defined"
            )
        places, source = (p._replace(offsets=np.delete(p.offsets, twice)) for p in (places, source))
        self._copy(func, dst, places, values, source, literal=literal)

    def _where(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = _bound(func, args, kwargs)
        mask = self._known(given["condition"])
        if mask is None or "other" not in given:
            return NotImplemented
        twin = on_meta(self.memory, func, args, kwargs)
        out = filled(self.memory, out := buffer_like(_empty_like(twin)), [(out.twin, _tensor(given["other"]))])
        if not twin.dim():
            return filled(self.memory, out, [(out.twin, _tensor(given["self"]))]) if mask.all() else out
        taken = _expanded(_tensor(given["self"]), twin.shape)
        index = of_mask(mask, twin.shape)
        places = (picked(t.shape, t.stride(), index) for t in (out, taken))
        self._copy(func, out, next(places), taken, next(places))
        return out

    def _copy(
        self, func: Any, dst: torch.Tensor, there: Places, src: torch.Tensor, here: Places, *, literal: bool = False
    ) -> None:
        """Follow the copies of the places ``here`` in ``src`` to those ``there`` in ``dst``."""
        runs = runs_of(there.offsets, here.offsets, there.unit, here.unit, MAX_RUNS)
        if runs is None:
            raise RecordError(
                f"the loader moves {self.memory.said([dst, src])} with {func} in more than {MAX_RUNS} pieces"
            )
        for run in runs:
            shape = (run.rows, run.length, *there.rest)
            target = piece(dst, run.first, shape, (run.step, there.unit, *there.strides))
            taken = piece(src, run.other, shape, (run.other_step, here.unit, *here.strides))
            self.memory.transfer(target, taken, literal=literal)

    # What an index says.

    def _known(self, tensor: torch.Tensor) -> Entry | None:
        known = self.memory.known(tensor)
        return None if known is None else known.detach().clone().numpy()

    def _of_index(self, given: Given) -> Index | None:
        index: Index = []
        for given_entry in given["indices"]:
            if given_entry is None:
                index.append(None)
                continue
            entry = self._known(given_entry)
            if entry is None or not (entry.ndim or entry.dtype != np.bool_):
                return None
            index.extend(np.nonzero(entry) if entry.dtype in (np.bool_, np.uint8) else [entry])
        return index if any(e is not None for e in index) else None

    def _of_rows(self, given: Given) -> Index | None:
        entry = self._known(given["index"])
        return None if entry is None else along(given["self"].shape, {_dim(given): entry.reshape(-1)})

    def _of_gather(self, given: Given) -> Index | None:
        entry = self._known(given["index"])
        return None if entry is None or not entry.ndim else along_one(entry, _dim(given))

    def _of_take(self, given: Given) -> Index | None:
        entry = self._known(given["index"])
        shape = given["self"].shape
        return None if entry is None else list(np.unravel_index(entry % max(given["self"].numel(), 1), shape))

    def _of_mask(self, given: Given) -> Index | None:
        entry = self._known(given["mask"])
        if entry is None or np.broadcast_shapes(entry.shape, given["self"].shape) != tuple(given["self"].shape):
            return None
        return of_mask(entry, given["self"].shape)

    def _of_embedding(self, given: Given) -> Index | None:
        entry = self._known(given["indices"])
        return None if entry is None else [entry]


def _of_flip(given: Given) -> Index | None:
    shape = given["self"].shape
    dims = {d % len(shape) for d in given["dims"]}
    return along(shape, {d: np.arange(shape[d])[::-1] for d in dims}) if dims else None


def _of_roll(given: Given) -> Index | None:
    shape, dims = given["self"].shape, given["dims"]
    if not dims:
        count = max(given["self"].numel(), 1)
        return list(np.unravel_index((np.arange(count).reshape(shape) - given["shifts"][0]) % count, shape))
    entries: dict[int, Entry] = {}
    for shift, dim in zip(given["shifts"], dims, strict=True):
        d = dim % len(shape)
        entries[d] = np.roll(entries.get(d, np.arange(shape[d])), shift)
    return along(shape, entries)


def _dim(given: Given) -> int:
    num_dims: int = given["self"].dim()
    return int(given["dim"]) % num_dims


def _bound(func: Any, args: Sequence[Any], kwargs: Given) -> Given:
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**given, **{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _expanded(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if isinstance(tensor, StandIn):
        return StandIn(tensor.source, tensor.twin.expand(tuple(shape)))
    return tensor.detach().expand(tuple(shape))
