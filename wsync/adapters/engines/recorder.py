"""Records how an engine's own loader lays out its parameters: the loader runs once on stand-ins that carry no data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.dispatch import LoaderRecorder
from wsync.adapters.engines.events import Arrivals, LiveConstant, arrivals_in
from wsync.adapters.engines.keeping import kept
from wsync.adapters.engines.live import LiveMemory
from wsync.adapters.engines.standins import Landing, Part, StandIn, stand_in_for
from wsync.adapters.engines.values import ValueGuard
from wsync.errors import DtypeMismatchError, MissingTensorError, RecordError, WsyncError
from wsync.plan.program import StorageMemory
from wsync.spec.manifest import CopySpec, RankInfo, SinkRankManifest, StorageSpec, TensorSpec
from wsync.spec.recipes import get_recipe, recipe_parts

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
"""An engine's loader: takes (checkpoint name, tensor) pairs and copies them into live memory."""

Recipes = Mapping[str, str] | Callable[[TensorSpec], str]
"""The recipe of each checkpoint tensor: by name (what is not named gets the default), or by a function."""


@dataclass(frozen=True)
class StorageCoverage:
    """How much of one live storage the recording covers, in elements.

    Attributes:
        names: the tensors in it.
        covered: written from the checkpoint.
        constant: set by the loader to values that are not from the checkpoint; they stay as they are.
        total: all.
    """

    names: tuple[str, ...]
    covered: int
    constant: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether every element is covered or constant."""
        return self.covered + self.constant >= self.total


@dataclass(frozen=True)
class Coverage:
    """How much of the engine a recording covers.

    Attributes:
        storages: those that take copies or constants.
        not_loaded: live buffers that the loader does not touch (rotary frequencies, caches): not weights.
        missing: parameters that it does not fill and that were allowed to be missing.
        unused: checkpoint tensors that it ignores (a tied lm_head).
    """

    storages: tuple[StorageCoverage, ...]
    not_loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def covered(self) -> int:
        """Elements that are written from the checkpoint."""
        return sum(s.covered for s in self.storages)

    @property
    def constant(self) -> int:
        """Elements that keep a constant."""
        return sum(s.constant for s in self.storages)

    @property
    def total(self) -> int:
        """Elements of all storages that the loader fills."""
        return sum(s.total for s in self.storages)

    @property
    def complete(self) -> bool:
        """Whether every parameter is filled."""
        return not self.missing and all(s.complete for s in self.storages)


@dataclass(frozen=True)
class Recording:
    """What an engine's loader does, as copies.

    Attributes:
        recipes: of every checkpoint tensor that is taken.
        offered: the recipe in which every tensor of the name table was offered to the loader.
        storages: the live memory that is written.
        copies: into it.
        constants: what the loader sets itself, in order; not written by a sync.
        coverage: what is covered and what is not.
        memory: where each storage lies.
        needs_verification: something arrives in live memory otherwise than straight from a view of a checkpoint tensor
            or as a number in the loader's code: through memory that the loader allocated, through other live memory,
            as a value read by ``item()``, or as a tensor of the loader's own. Then use `verify_recording`.
    """

    recipes: dict[str, str]
    offered: dict[str, str]
    storages: tuple[StorageSpec, ...]
    copies: tuple[CopySpec, ...]
    constants: tuple[LiveConstant, ...]
    coverage: Coverage
    memory: list[StorageMemory]
    needs_verification: bool
    _live: LiveMemory = field(repr=False)
    _live_idx: tuple[int, ...] = field(repr=False)
    _module: nn.Module | None = field(repr=False, default=None)

    def manifest(self, replica: str, rank: int, world_size: int, info: RankInfo) -> SinkRankManifest:
        """The manifest of this engine rank."""
        return SinkRankManifest(replica, rank, world_size, info, dict(self.recipes), self.storages, self.copies)

    def check_addresses(self, current: Mapping[str, torch.Tensor] | None = None) -> None:
        """Check that the engine's tensors are where they were, and what they were.

        Args:
            current: the engine's live tensors by name, as they are now. Only with it a parameter is noticed that the
                engine replaced by another one.

        Raises:
            StateError: one was moved, freed, replaced, added or removed; the message names it and both values.
        """
        self._live.check_addresses(current)

    def live_views(self) -> list[tuple[str, torch.Tensor, int | None]]:
        """Every piece of live memory: the name of a tensor in it, its flat view, its storage index if it is written."""
        recorded = {live_idx: i for i, live_idx in enumerate(self._live_idx)}
        return [(s.names[0], self._live.flat(i), recorded.get(i)) for i, s in enumerate(self._live.storages)]

    def kept(self) -> AbstractContextManager[None]:
        """A context after which the engine's tensors are where they were before."""
        return kept(self._live.tensors, self._module)

    def storage_view(self, storage_idx: int) -> torch.Tensor:
        """The live memory of a storage as a flat tensor `[num_elements]` of its dtype."""
        return self._live.flat(self._live_idx[storage_idx])

    @torch.no_grad()
    def write_constants(self) -> None:
        """Set what the loader sets itself (padding to zero), for an engine that never loaded a checkpoint.

        Touches no element that the copies write, so that it may run before or after them.
        """
        for c in self.constants:
            c.write(self.storage_view(c.storage_idx))


def default_recipe(spec: TensorSpec) -> str:
    """``bf16`` for bf16 and f32 tensors, ``raw`` for all others."""
    return "bf16" if spec.dtype in ("bfloat16", "float32") else "raw"


def recipe_of(spec: TensorSpec, recipes: Recipes | None) -> str:
    """The declared recipe of a tensor, or the default.

    Raises:
        RecipeError: the declared one is unknown.
    """
    if recipes is None:
        return default_recipe(spec)
    name = recipes(spec) if callable(recipes) else recipes.get(spec.name, default_recipe(spec))
    return get_recipe(name).name


def record_loader(
    load_weights: LoadWeights,
    name_table: Sequence[TensorSpec],
    params: Mapping[str, torch.Tensor],
    recipes: Recipes | None,
    *,
    allow_missing: Collection[str] = (),
    module: nn.Module | None = None,
) -> Recording:
    """Run an engine's loader on stand-ins and record every copy into live memory. No live byte changes.

    Each tensor of the name table is offered as its recipe's parts would stand in a checkpoint of that format
    (``weight`` and, for block fp8, ``weight_scale_inv``); f32 tensors of the trainer are offered as bf16. An f32 tensor
    that the loader puts into f32 memory is recorded with the recipe ``raw`` instead, and keeps its bits.

    Args:
        load_weights: takes pairs of a checkpoint name and a tensor. It runs on this thread, once.
        name_table: the source's tensors.
        params: live parameters and buffers by the engine's names; they must stay where they are.
        recipes: by checkpoint name, or a function of the tensor; None is the default for all.
        allow_missing: live parameters that the loader need not fill.
        module: holds the live tensors. Where it is given, what the loader puts in their place is taken out again.

    Live tensors have their own memory again when this returns or raises.

    Raises:
        RecordError: the loader did something that cannot be recorded as copies, or failed; names operation and tensor.
        DtypeMismatchError: a copy would convert values and no recipe gives the live dtype.
        ShapeMismatchError: a copy's shapes differ.
        MissingTensorError: a parameter that is not filled, or not wholly.
        StateError: the loader replaced live memory.
    """
    live = LiveMemory(params)
    parts = [
        Part(spec, part, recipe)
        for spec in name_table
        for recipe in (recipe_of(spec, recipes),)
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipe)
    ]
    recorder = LoaderRecorder(live)
    with kept(live.tensors, module):
        _run(load_weights, parts, recorder)
        live.check_addresses()
        if module is not None:
            _check_held(live, module)
    by_storage = recorder.memory.landings
    used = {landing.source.spec.name for found in by_storage for landing in found if isinstance(landing.source, Part)}
    unused = tuple(spec.name for spec in name_table if spec.name not in used)
    found = _assemble(live, by_storage, parts, unused, set(allow_missing))
    return replace(found, needs_verification=recorder.memory.indirect, _module=module)


def _run(load_weights: LoadWeights, parts: Sequence[Part], recorder: LoaderRecorder) -> None:
    offered = ""

    def stand_ins() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal offered
        for part in parts:
            offered = part.part.name
            yield part.part.name, stand_in_for(part)

    guard = ValueGuard(recorder.memory)
    try:
        with torch.no_grad(), recorder, guard:
            load_weights(stand_ins())
        guard.check_scalars()
    except WsyncError:
        raise
    except Exception as e:
        raise RecordError(f"the engine's loader failed at or before {offered!r}: {type(e).__name__}: {e}") from e


def _check_held(live: LiveMemory, module: nn.Module) -> None:
    """Refuse a loader that put a stand-in where a module holds a tensor."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, StandIn):
            raise RecordError(
                f"the loader replaces the engine's {name!r} by a tensor of the checkpoint; it must be written in place",
                hint="copy into the parameter instead: param.data.copy_(tensor)",
            )


def _assemble(
    live: LiveMemory,
    by_storage: Sequence[Sequence[Landing]],
    parts: Sequence[Part],
    unused: tuple[str, ...],
    allow: set[str],
) -> Recording:
    arrivals = [arrivals_in(i, s, by_storage[i]) for i, s in enumerate(live.storages)]
    missing = _check_filled(live, arrivals, allow)
    written = [i for i, a in enumerate(arrivals) if a.covered or a.constant]
    renumbered = {old: new for new, old in enumerate(written)}
    copies = [c for i in written for c in _moved(arrivals[i].copies, renumbered)]
    memory = live.memory()
    storages = [live.storages[i] for i in written]
    coverage = Coverage(
        storages=tuple(
            StorageCoverage(
                tuple(live.storages[i].names), arrivals[i].covered, arrivals[i].constant, live.storages[i].total
            )
            for i in written
        ),
        not_loaded=tuple(
            n for i, s in enumerate(live.storages) if i not in renumbered and not s.is_parameter for n in s.names
        ),
        missing=missing,
        unused=unused,
    )
    return Recording(
        recipes=_final_recipes(arrivals, parts),
        offered={p.spec.name: p.recipe for p in parts},
        storages=tuple(
            StorageSpec(s.names[0], memory[i].dtype, s.num_elements) for i, s in zip(written, storages, strict=True)
        ),
        copies=tuple(copies),
        constants=tuple(c._replace(storage_idx=renumbered[i]) for i in written for c in arrivals[i].constants),
        coverage=coverage,
        memory=[memory[i] for i in written],
        needs_verification=True,
        _live=live,
        _live_idx=tuple(written),
    )


def _moved(copies: Iterable[CopySpec], renumbered: Mapping[int, int]) -> Iterator[CopySpec]:
    for c in copies:
        yield CopySpec(c.tensor, c.role, c.box, renumbered[c.storage_idx], c.dst_offset, c.dst_strides)


def _check_filled(live: LiveMemory, arrivals: Sequence[Arrivals], allow: set[str]) -> tuple[str, ...]:
    """The parameters that are allowed to be missing and are; refuses others."""
    missing: list[str] = []
    for storage, found in zip(live.storages, arrivals, strict=True):
        filled = found.covered + found.constant
        if filled >= storage.total or (not filled and not storage.is_parameter):
            continue
        if not allow.isdisjoint(storage.names):
            missing.extend(storage.names)
            continue
        raise MissingTensorError(
            f"the loader fills {filled} of the {storage.total} elements of the engine's {storage.names[0]!r}",
            hint="the trainer lacks its checkpoint tensor, or the engine derives it: allow it to be missing then",
        )
    return tuple(missing)


def _final_recipes(arrivals: Sequence[Arrivals], parts: Sequence[Part]) -> dict[str, str]:
    raw = {name for a in arrivals for name in a.raw}
    taken = {c.tensor for a in arrivals for c in a.copies}
    for found in arrivals:
        rounded = {c.tensor for c in found.copies} - found.raw
        if both := sorted(raw & rounded):
            raise DtypeMismatchError(
                f"{both[0]!r} is copied into float32 and into bfloat16 memory of one engine; a tensor has one recipe"
            )
    recipes = {p.spec.name: p.recipe for p in parts if p.spec.name in taken}
    return {name: "raw" if name in raw else recipe for name, recipe in recipes.items()}
