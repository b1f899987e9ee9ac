"""Which recipe an engine wants for each tensor, where the caller does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.recorder import Recipes
from wsync.adapters.engines.wanted import wanted_recipes
from wsync.errors import RecipeError
from wsync.spec.manifest import TensorSpec

_FP8 = torch.float8_e4m3fn
_BLOCK = [128, 128]
_DEFAULT = "fp8_block128"


def engine_recipes(
    load_weights: Callable[..., Any],
    name_table: Sequence[TensorSpec],
    tensors: Mapping[str, torch.Tensor],
    module: nn.Module,
    quantisation: Any,
    given: Recipes | None,
) -> Recipes | None:
    """The recipe of every tensor that the engine holds quantised, where ``given`` names none.

    The engine's loader says which tensors these are: it puts them into e4m3 memory. Runs that loader once more, on
    stand-ins, and only for an engine that has such memory.

    Args:
        load_weights, name_table, tensors, module: as for `record_loader`.
        quantisation: the engine's ``quant_config``; its ``weight_block_size`` says which scales its kernels read.
        given: by the caller; a function decides alone.

    Raises:
        RecipeError: an engine whose scales are not one for each 128x128 block.
    """
    if callable(given) or not any(t.dtype == _FP8 for t in tensors.values()):
        return given
    named = dict(given or {})
    wanted = wanted_recipes(load_weights, name_table, tensors, module=module)
    quantised = [name for name, dtypes in wanted.items() if _FP8 in dtypes and name not in named]
    block = getattr(quantisation, "weight_block_size", None)
    if quantised and list(block or ()) != _BLOCK:
        raise RecipeError(
            f"the engine holds {quantised[0]!r} and {len(quantised) - 1} others in e4m3 with scales of blocks {block}; "
            f"wsync quantises by blocks of {_BLOCK}",
            hint="serve a checkpoint in bf16, or in fp8 with weight_block_size [128, 128]",
        )
    return {**dict.fromkeys(quantised, _DEFAULT), **named}
