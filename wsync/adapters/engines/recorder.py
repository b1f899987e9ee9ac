"""Records how an engine's own loader lays out its parameters: the loader runs once on stand-ins that carry no data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from wsync.adapters.engines.coverage import Coverage, StorageCoverage
from wsync.adapters.engines.events import Arrivals, LiveConstant, arrivals_in
from wsync.adapters.engines.keeping import kept
from wsync.adapters.engines.live import LiveMemory, LiveStorage
from wsync.adapters.engines.offering import LoadWeights as LoadWeights
from wsync.adapters.engines.offering import Recipes as Recipes
from wsync.adapters.engines.offering import offered_parts, run_on_stand_ins
from wsync.adapters.engines.resolve import Landing
from wsync.adapters.engines.sources import Part
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.adapters.engines.widening import Widening, with_widenings
from wsync.errors import DtypeMismatchError, MissingTensorError
from wsync.plan.program import StorageMemory
from wsync.session.laststep import LastSteps
from wsync.spec.manifest import CopySpec, RankInfo, SinkRankManifest, StorageSpec, TensorSpec


@dataclass(frozen=True)
class Recording:
    """What an engine's loader does, as copies.

    Attributes:
        recipes: of every checkpoint tensor that is taken.
        offered: the recipe in which every tensor of the name table was offered to the loader.
        storages: the live memory that is written, then the scratch memory of what is widened.
        copies: into both.
        constants: what the loader sets itself, in order; not written by a sync.
        coverage: what is covered and what is not.
        memory: where each storage lies.
        needs_verification: something arrives in live memory otherwise than straight from a view of a checkpoint tensor
            or as a number in the loader's code: through memory that the loader allocated, through other live memory,
            as a value read by ``item()``, or as a tensor of the loader's own. Then use `verify_recording`.
        widened: live memory whose values arrive in a narrower dtype; `last_steps` converts them at the commit.
        scratch: memory of storages that come after all these, of what is transformed (`with_transforms`).
    """

    recipes: dict[str, str]
    offered: dict[str, str]
    storages: tuple[StorageSpec, ...]
    copies: tuple[CopySpec, ...]
    constants: tuple[LiveConstant, ...]
    coverage: Coverage
    memory: list[StorageMemory]
    needs_verification: bool
    widened: tuple[Widening, ...]
    _live: LiveMemory = field(repr=False)
    _live_idx: tuple[int, ...] = field(repr=False)
    _module: nn.Module | None = field(repr=False, default=None)
    scratch: tuple[torch.Tensor, ...] = field(repr=False, default=())

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

    def last_steps(self, engine: LastSteps | None = None) -> LastSteps:
        """What is left to do when all copies have arrived: the widenings, which each have their own scratch memory.

        Args:
            engine: the last steps of the engine itself, which the result includes. What is widened into the scratch
                memory of one of its repacks is widened before that repack prepares; what is live, at the commit.
        """
        return with_widenings(engine or LastSteps(), self.widened)

    def storage_view(self, storage_idx: int) -> torch.Tensor:
        """The memory of a storage, live or scratch, as a flat tensor `[num_elements]` of its dtype."""
        if storage_idx >= len(self._live_idx):
            return self.widened[storage_idx - len(self._live_idx)].scratch
        return self._live.flat(self._live_idx[storage_idx])

    def storage_shape(self, storage_idx: int) -> tuple[int, ...]:
        """The shape of the live tensor that is a storage; flat where no tensor is all of it."""
        if storage_idx >= len(self._live_idx):
            return (self.storages[storage_idx].num_elements,)
        return self._live.shape_of(self._live.storages[self._live_idx[storage_idx]])

    def matrix_at(self, storage_idx: int, element: int) -> tuple[str, tuple[int, ...]]:
        """The live tensor and the number of its matrix that an element of a storage belongs to."""
        if storage_idx >= len(self._live_idx):
            return "", ()
        return self._live.matrix_at(self._live.storages[self._live_idx[storage_idx]], element)

    @torch.no_grad()
    def write_constants(self) -> None:
        """Set what the loader sets itself (padding to zero), for an engine that never loaded a checkpoint.

        Touches no element that the copies write, so that it may run before or after them.
        """
        for c in self.constants:
            c.write(self.storage_view(c.storage_idx))


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
    (``weight`` and its scales, such as ``weight_scale_inv``); f32 tensors of the trainer are offered as bf16. An f32
    tensor that the loader puts into f32 memory is recorded with the recipe ``raw`` instead, and keeps its bits. A bf16
    or f16 tensor that it puts into wider memory arrives in scratch memory and is widened at the commit
    (`Recording.widened`).

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
        DtypeMismatchError: a copy would round values, and no recipe gives the live dtype.
        ShapeMismatchError: a copy's shapes differ.
        MissingTensorError: a parameter that is not filled, or not wholly.
        StateError: the loader replaced live memory.
    """
    memory = TrackedMemory(LiveMemory(params))
    parts = offered_parts(name_table, recipes)
    run_on_stand_ins(load_weights, parts, memory, module)
    by_storage = memory.landings
    used = {landing.source.spec.name for found in by_storage for landing in found if isinstance(landing.source, Part)}
    unused = tuple(spec.name for spec in name_table if spec.name not in used)
    found = _assemble(memory.live, by_storage, parts, unused, set(allow_missing))
    return replace(found, needs_verification=memory.indirect, _module=module)


def _assemble(
    live: LiveMemory,
    by_storage: Sequence[Sequence[Landing]],
    parts: Sequence[Part],
    unused: tuple[str, ...],
    allow: set[str],
) -> Recording:
    arrivals = [arrivals_in(i, s, live.shape_of(s), by_storage[i]) for i, s in enumerate(live.storages)]
    missing = _check_filled(live, arrivals, allow)
    written = [i for i, a in enumerate(arrivals) if a.covered or a.constant]
    renumbered = {old: new for new, old in enumerate(written)}
    memory = live.memory()
    widened = _widenings(live, arrivals, written)
    into_scratch = [copies for i in written for _, copies in arrivals[i].widened]
    copies = [
        *(c for i in written for c in _moved(arrivals[i].copies, renumbered[i])),
        *(c for w, found in zip(widened, into_scratch, strict=True) for c in _moved(found, w.scratch_idx)),
    ]
    coverage = Coverage(
        storages=tuple(_covered(live.storages[i], arrivals[i]) for i in written),
        not_loaded=tuple(
            n for i, s in enumerate(live.storages) if i not in renumbered and not s.is_parameter for n in s.names
        ),
        missing=missing,
        unused=unused,
    )
    return Recording(
        recipes=_final_recipes(arrivals, parts),
        offered={p.spec.name: p.recipe for p in parts},
        storages=(
            *(StorageSpec(live.storages[i].names[0], memory[i].dtype, memory[i].num_elements) for i in written),
            *(w.spec() for w in widened),
        ),
        copies=tuple(copies),
        constants=tuple(c._replace(storage_idx=renumbered[i]) for i in written for c in arrivals[i].constants),
        coverage=coverage,
        memory=[*(memory[i] for i in written), *(w.memory() for w in widened)],
        needs_verification=True,
        widened=widened,
        _live=live,
        _live_idx=tuple(written),
    )


def _covered(storage: LiveStorage, found: Arrivals) -> StorageCoverage:
    itemsize = storage.dtype.itemsize
    widened = (found.covered - found.direct) * itemsize
    names = tuple(storage.names)
    return StorageCoverage(names, found.covered, found.constant, storage.total, found.direct * itemsize, widened)


def _widenings(live: LiveMemory, arrivals: Sequence[Arrivals], written: Sequence[int]) -> tuple[Widening, ...]:
    """Scratch memory for all that arrives in a narrower dtype; its storages come after the live ones."""
    found: list[Widening] = []
    for new, i in enumerate(written):
        for region, _ in arrivals[i].widened:
            scratch = torch.zeros(region.num_elements, dtype=region.dtype)
            name = live.storages[i].names[0]
            found.append(Widening(name, len(written) + len(found), new, region, scratch, live.flat(i)))
    return tuple(found)


def _moved(copies: Iterable[CopySpec], storage_idx: int) -> Iterator[CopySpec]:
    for c in copies:
        yield CopySpec(c.tensor, c.role, c.box, storage_idx, c.dst_offset, c.dst_strides)


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
    taken = {c.tensor for a in arrivals for c in a.all_copies}
    for found in arrivals:
        rounded = {c.tensor for c in found.all_copies} - found.raw
        if both := sorted(raw & rounded):
            raise DtypeMismatchError(
                f"{both[0]!r} is copied into float32 and into bfloat16 memory of one engine; a tensor has one recipe"
            )
    recipes = {p.spec.name: p.recipe for p in parts if p.spec.name in taken}
    return {name: "raw" if name in raw else recipe for name, recipe in recipes.items()}
