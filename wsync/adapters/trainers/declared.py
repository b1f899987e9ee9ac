"""The recipes that a trainer declares for engines that declare none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import structs

from wsync.errors import UnknownTensorError
from wsync.spec.manifest import PARAMETER, TensorSpec
from wsync.spec.recipes import get_recipe, recipe_parts

Declared = str | Mapping[str, str] | Callable[[TensorSpec], str | None]
"""One recipe for every float parameter of two or more dimensions, or recipes by checkpoint name, or a function."""

_FLOATS = ("bfloat16", "float16", "float32")


def with_recipes(tensors: tuple[TensorSpec, ...], declared: Declared | None) -> tuple[TensorSpec, ...]:
    """The tensors with the recipes that are declared for them.

    Raises:
        RecipeError: a recipe is unknown, or cannot encode its tensor.
        UnknownTensorError: a recipe for a name that is not there.
    """
    if declared is None:
        return tensors
    if isinstance(declared, Mapping):
        unknown = sorted(set(declared) - {t.name for t in tensors})
        if unknown:
            raise UnknownTensorError(
                f"recipe names {unknown[0]!r}, which is none of the model's {len(tensors)} tensors"
            )
    if isinstance(declared, str):
        get_recipe(declared)
    return tuple(_with_recipe(tensor, declared) for tensor in tensors)


def _with_recipe(tensor: TensorSpec, declared: Declared) -> TensorSpec:
    if isinstance(declared, str):
        is_matrix = (
            tensor.kind == PARAMETER and len(tensor.shape) > 1 and 0 not in tensor.shape and tensor.dtype in _FLOATS
        )
        recipe = declared if is_matrix else None
    else:
        recipe = declared(tensor) if callable(declared) else declared.get(tensor.name)
    if recipe is None:
        return tensor
    recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)  # refuses what cannot be
    return structs.replace(tensor, recipe=recipe)
