"""An engine's manifest from a model, a layout string and a recipe."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wsync.describe.engines.advice import working_layouts
from wsync.describe.engines.choices import check_recipe
from wsync.describe.engines.grid import ROUND_ROBIN, Grid, Place, experts_of_rank, layers_of_stage
from wsync.describe.engines.groups import Module, gather
from wsync.describe.engines.modules import RankBuilder
from wsync.describe.engines.storages import PartBoxes, Storages
from wsync.describe.layout import MAX_COPIES
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import EMBEDDING, OTHER
from wsync.describe.ranks import rank_infos
from wsync.describe.trainers.fsdp import num_experts
from wsync.describe.trainers.scheme import num_layers
from wsync.errors import ConfigError, ManifestError, RecipeError
from wsync.spec.manifest import DEVICE, CopySpec, Memory, SinkManifest, SinkRankManifest, StorageSpec


def describe_sink(
    model: ModelShape,
    layout: str,
    hosts: Sequence[str],
    recipe: str,
    gpus: Sequence[int] | None = None,
    memory: Memory = DEVICE,
) -> SinkManifest:
    """What every rank of all replicas of an engine needs, and where in its memory that goes.

    The layout is vLLM's: fused projections, stacked experts, a padded vocabulary. The same rank of every replica has
    the same tuple of copies, the same object.

    Args:
        model: from `load_model`.
        layout: such as ``tp=8,replicas=4`` or ``ep=16,replicas=8``; `wsync.describe.engines.KEYS` has all keys.
        hosts: the host of each rank, replica by replica.
        recipe: of the weights of linear layers and experts; what engines do not quantise stays ``bf16`` or ``raw``.
        gpus: the GPU of each rank on its host; None leaves it to the planner, as `RankInfo` says.
        memory: where ranks keep what they receive until they install it, as `RankInfo` says.

    Raises:
        ConfigError: a layout that is malformed, or does not divide the world or the model.
        RecipeError: a recipe that is unknown, or does not fit the cut.
        ManifestError: a matrix that the layout does not say how to cut.
    """
    check_recipe(recipe)
    grid = Grid(layout)
    grid.check_world(len(hosts))
    total = num_experts(model)
    if grid.ep > max(total, 1):
        raise ConfigError(f"layout {layout!r} has ep={grid.ep}, but {model.name} has {total} experts")
    if grid.placement == ROUND_ROBIN:
        _check_groups(model, layout)
    with _no_collection():
        try:
            ranks = _describe_replica(model, grid, recipe, total)
        except RecipeError as e:
            raise RecipeError(e.message, hint=_advice(model, grid, recipe, total) or e.hint) from e
    return SinkManifest(
        tuple(
            SinkRankManifest(
                replica=f"engine-{i // grid.size}",
                rank=i % grid.size,
                world_size=grid.size,
                info=info,
                recipes=ranks[i % grid.size].recipes,
                storages=ranks[i % grid.size].storages,
                copies=ranks[i % grid.size].copies,
                scale_groups=ranks[i % grid.size].scale_groups,
            )
            for i, info in enumerate(rank_infos(hosts, gpus, memory))
        )
    )


def _advice(model: ModelShape, grid: Grid, recipe: str, total: int) -> str:
    def of_outer_ranks(other: Grid) -> None:
        if other.ep > max(total, 1):
            raise ConfigError(f"ep={other.ep}, but {total} experts")
        _describe_replica(model, other, recipe, total, (0, other.size - 1))

    found = working_layouts(grid, total > 0, of_outer_ranks)
    return f"{recipe} fits these layouts of as many ranks: {' or '.join(found)}" if found else ""


def engine_ranks(layout: str) -> int:
    """How many ranks the replicas of a layout have together. Raises as `describe_sink`."""
    return Grid(layout).num_ranks


def _check_groups(model: ModelShape, layout: str) -> None:
    """vLLM places experts of other models linearly, whatever it is told.

    Source: vLLM ``determine_expert_placement_strategy``.
    """
    moe = None if model.facts is None else model.facts.moe
    groups = 1 if moe is None else moe.num_groups
    if groups < 2:
        raise ConfigError(
            f"layout {layout!r} has placement={ROUND_ROBIN}, which engines take for models with several groups of "
            f"experts, but {model.name} has {groups}",
            hint="leave placement out",
        )


class _Described:
    """What the same rank of every replica has in common."""

    def __init__(self, storages: Storages, scale_groups: list[tuple[str, ...]]) -> None:
        self.recipes = storages.recipes
        self.storages: tuple[StorageSpec, ...] = tuple(storages.storages)
        self.copies: tuple[CopySpec, ...] = tuple(storages.copies)
        self.scale_groups = tuple(scale_groups)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hundreds of thousands of small objects are made and kept: the collector would only walk over them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _describe_replica(
    model: ModelShape, grid: Grid, recipe: str, total: int, ranks: Sequence[int] | None = None
) -> list[_Described]:
    modules = gather(tuple(t for t in model.tensors if t.alias_of is None))
    tied = {t.alias_of for t in model.tensors}
    parts = PartBoxes()
    layers = num_layers(model)
    out: list[_Described] = []
    num_copies = 0
    for rank in range(grid.size) if ranks is None else ranks:
        place = grid.place(rank)
        experts = experts_of_rank(total, place.ep, place.ep_size, grid.placement)
        builder = RankBuilder(model.facts, place, recipe, Storages(parts))
        stage = layers_of_stage(layers, place.pp, place.pp_size) if grid.pp > 1 else range(layers)
        for module in modules:
            if _on_stage(module, stage, place, tied):
                builder.add(module, experts)
        out.append(_Described(builder.storages, builder.scale_groups))
        num_copies += len(builder.storages.copies)
        if num_copies > MAX_COPIES:
            raise ConfigError(
                f"the first {len(out)} of the {grid.size} ranks of a replica take {num_copies} copies, allowed are "
                f"{MAX_COPIES}"
            )
    return out


def _on_stage(module: Module, stage: range, place: Place, tied: set[str | None]) -> bool:
    """Whether a stage has a module; an embedding that is also the output layer is on the last stage, too."""
    is_last = place.pp == place.pp_size - 1
    if place.pp_size == 1:
        return True
    if module.layer is not None:
        return module.layer in stage or (is_last and module.layer >= stage.stop)
    kinds = {kind for kind, _ in module.by_kind}
    if kinds == {EMBEDDING}:
        return place.pp == 0 or (is_last and any(t.name in tied for t, _ in module.by_kind.values()))
    if OTHER in kinds:
        raise ManifestError(f"{module.stem!r} is in no layer, and pp={place.pp_size} does not say which stage has it")
    return is_last
