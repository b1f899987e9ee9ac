"""An engine's manifest from a model, a layout string and a recipe."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wsync.describe.engines.choices import check_recipe
from wsync.describe.engines.grid import Grid, experts_of_rank, layers_of_stage
from wsync.describe.engines.groups import Module, gather
from wsync.describe.engines.modules import RankBuilder
from wsync.describe.engines.storages import PartBoxes, Storages
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import EMBEDDING, OTHER
from wsync.describe.trainers.fsdp import num_experts
from wsync.describe.trainers.scheme import num_layers
from wsync.errors import ConfigError, ManifestError
from wsync.spec.manifest import CopySpec, RankInfo, SinkManifest, SinkRankManifest, StorageSpec, TensorSpec


def describe_sink(model: ModelShape, layout: str, hosts: Sequence[str], recipe: str) -> SinkManifest:
    """What every rank of all replicas of an engine needs, and where in its memory that goes.

    The layout is vLLM's: fused projections, stacked experts, a padded vocabulary. The same rank of every replica has
    the same tuple of copies, the same object.

    Args:
        model: from `load_model`.
        layout: such as ``tp=8,replicas=4`` or ``ep=16,replicas=8``; `wsync.describe.engines.KEYS` has all keys.
        hosts: the host of each rank, replica by replica.
        recipe: of the weights of linear layers and experts; what engines do not quantise stays ``bf16`` or ``raw``.

    Raises:
        ConfigError: a layout that is malformed, or does not divide the world or the model.
        RecipeError: a recipe that is unknown, or does not fit the cut.
        ManifestError: a matrix that the layout does not say how to cut.
    """
    check_recipe(recipe)
    grid = Grid(layout, len(hosts))
    total = num_experts(model)
    if grid.ep > max(total, 1):
        raise ConfigError(f"layout {layout!r} has ep={grid.ep}, but {model.name} has {total} experts")
    with _no_collection():
        ranks = _describe_replica(model, grid, recipe, total)
    return SinkManifest(
        tuple(
            SinkRankManifest(
                replica=f"engine-{i // grid.size}",
                rank=i % grid.size,
                world_size=grid.size,
                info=RankInfo(host, i),
                recipes=ranks[i % grid.size].recipes,
                storages=ranks[i % grid.size].storages,
                copies=ranks[i % grid.size].copies,
                scale_groups=ranks[i % grid.size].scale_groups,
            )
            for i, host in enumerate(hosts)
        )
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


def _describe_replica(model: ModelShape, grid: Grid, recipe: str, total: int) -> list[_Described]:
    modules = gather(_taken(model, grid.pp))
    parts = PartBoxes()
    layers = num_layers(model)
    out = []
    for rank in range(grid.size):
        place = grid.place(rank)
        experts = experts_of_rank(total, place.ep, place.ep_size, grid.placement)
        builder = RankBuilder(model.facts, place, recipe, Storages(parts))
        stage = layers_of_stage(layers, place.pp, place.pp_size) if grid.pp > 1 else range(layers)
        for module in modules:
            if _on_stage(module, stage, place.pp, place.pp_size):
                builder.add(module, experts)
        out.append(_Described(builder.storages, builder.scale_groups))
    return out


def _taken(model: ModelShape, stages: int) -> tuple[TensorSpec, ...]:
    """Tied tensors are one memory, except where they are on different stages."""
    return tuple(t for t in model.tensors if t.alias_of is None or stages > 1)


def _on_stage(module: Module, stage: range, pp: int, pp_size: int) -> bool:
    if pp_size == 1:
        return True
    if module.layer is not None:
        return module.layer in stage or (pp == pp_size - 1 and module.layer >= stage.stop)
    kinds = {kind for kind, _ in module.by_kind}
    if kinds == {EMBEDDING}:
        return pp == 0
    if OTHER in kinds:
        raise ManifestError(f"{module.stem!r} is in no layer, and pp={pp_size} does not say which stage has it")
    return pp == pp_size - 1
