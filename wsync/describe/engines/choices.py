"""Which recipe each tensor takes: engines quantise the weights of linear layers and experts, and nothing else."""

from __future__ import annotations

from wsync.describe.parts import (
    DOWN,
    GATE,
    GATE_UP,
    INDEXER,
    KV_A,
    KV_B,
    LINEAR_OUT,
    LINEAR_QKV,
    LINEAR_Z,
    NORM,
    OUT,
    Q_A,
    Q_B,
    UP,
    K,
    Part,
    Q,
    V,
)
from wsync.errors import RecipeError
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import get_recipe

QUANTISED = frozenset({Q, K, V, OUT, Q_A, KV_A, Q_B, KV_B, GATE, UP, DOWN, GATE_UP, LINEAR_QKV, LINEAR_Z, LINEAR_OUT})
"""Not embeddings, the output layer, norms, routers, biases, and what has one row for each head."""

_INDEXER = ("wq_b.weight", "wk.weight")


def recipe_of(tensor: TensorSpec, part: Part, recipe: str) -> str:
    """The recipe of one tensor of an engine whose linear layers take ``recipe``."""
    quantised = part.kind in QUANTISED or (part.kind == INDEXER and tensor.name.endswith(_INDEXER))
    if quantised and not part.bias and len(tensor.shape) > 1:
        return recipe
    # An engine keeps norms in bf16 whatever the checkpoint has, and what is one number for each head as it is.
    in_bf16 = tensor.dtype == "bfloat16" or (tensor.dtype == "float32" and (part.bias or part.kind == NORM))
    return "bf16" if in_bf16 else "raw"


def check_recipe(recipe: str) -> None:
    """Refuse what is no recipe of a whole engine.

    Raises:
        RecipeError: it is unknown.
    """
    get_recipe(recipe)


def check_transposed(name: str, recipe: str) -> None:
    """Refuse to quantise experts whose inputs are rows: an engine's scales follow the transposed matrix.

    Raises:
        RecipeError: the recipe has scales.
    """
    if get_recipe(recipe).quantised:
        raise RecipeError(
            f"recipe {recipe!r} has scales along the inputs, but the checkpoint keeps {name!r} with inputs as rows",
            hint="describe it with --recipe bf16",
        )
