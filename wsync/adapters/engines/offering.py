"""Runs an engine's loader on stand-ins of a whole checkpoint, and leaves the engine as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.dispatch import LoaderRecorder
from wsync.adapters.engines.keeping import kept
from wsync.adapters.engines.sources import Part
from wsync.adapters.engines.standins import StandIn, stand_in_for
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.adapters.engines.values import ValueGuard
from wsync.errors import RecordError, WsyncError
from wsync.spec.manifest import PARAMETER, TensorSpec
from wsync.spec.recipes import get_recipe, recipe_parts

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
"""An engine's loader: takes (checkpoint name, tensor) pairs and copies them into live memory."""

Recipes = Mapping[str, str] | Callable[[TensorSpec], str]
"""The recipe of each checkpoint tensor: by name (what is not named gets the default), or by a function."""


def default_recipe(spec: TensorSpec) -> str:
    """What the trainer declared; else ``bf16`` for bf16 and f32 tensors, ``raw`` for all others."""
    if spec.recipe is not None:
        return spec.recipe
    if spec.kind != PARAMETER and spec.dtype == "bfloat16":
        return "raw"  # the same bytes, and buffers may hold anything
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


def offered_parts(name_table: Sequence[TensorSpec], recipes: Recipes | None) -> list[Part]:
    """What a checkpoint of these recipes holds, in the order of the name table.

    Raises:
        RecipeError: a recipe is unknown, or cannot encode its tensor.
    """
    return [
        Part(spec, part, recipe)
        for spec in name_table
        for recipe in (recipe_of(spec, recipes),)
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipe)
    ]


def run_on_stand_ins(
    load_weights: LoadWeights, parts: Sequence[Part], memory: TrackedMemory, module: nn.Module | None
) -> None:
    """Run a loader; what it does is in ``memory`` then. Live tensors are as before when this returns or raises.

    Raises:
        RecordError: the loader did something that cannot be recorded, or failed.
        StateError: it replaced live memory.
    """
    with kept(memory.live.tensors, module):
        _run(load_weights, parts, memory)
        memory.live.check_addresses()
        if module is not None:
            _check_held(module)


def _run(load_weights: LoadWeights, parts: Sequence[Part], memory: TrackedMemory) -> None:
    offered = ""

    def stand_ins() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal offered
        for part in parts:
            offered = part.part.name
            yield part.part.name, stand_in_for(part)

    guard = ValueGuard(memory)
    try:
        with torch.no_grad(), LoaderRecorder(memory), guard:
            load_weights(stand_ins())
        guard.check_scalars()
    except WsyncError:
        raise
    except Exception as e:
        raise RecordError(f"the engine's loader failed at or before {offered!r}: {type(e).__name__}: {e}") from e


def _check_held(module: nn.Module) -> None:
    """Refuse a loader that put a stand-in where a module holds a tensor."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, StandIn):
            raise RecordError(
                f"the loader replaces the engine's {name!r} by a tensor of the checkpoint; it must be written in place",
                hint="copy into the parameter instead: param.data.copy_(tensor)",
            )
