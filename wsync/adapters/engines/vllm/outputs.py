"""What a layer computes: the only way to compare native matrices, and to see whether a kernel reads its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.vllm.reloading import registered

Tensor = torch.Tensor

_NUM_TOKENS = 3
_INDICES = (torch.int16, torch.int32, torch.int64)


@torch.no_grad()
def output_of(layer: nn.Module) -> Tensor | None:
    """What a linear layer makes of a fixed input without its bias, or None where that cannot be asked.

    Experts are not asked: their kernels take the router's choices, too.
    """
    method = getattr(layer, "quant_method", None)
    size = getattr(layer, "input_size_per_partition", None) or getattr(layer, "embedding_dim", None)
    if not isinstance(method, _linear_methods()) or not isinstance(size, int):
        return None
    if any(t.dtype in _INDICES for t in registered(layer).values()):
        return None  # native code does not check them
    dtype = _dtype_of(layer)
    generator = torch.Generator().manual_seed(size)
    x = (torch.rand(_NUM_TOKENS, size, generator=generator) - 0.4).to(dtype)
    apply: Any = getattr(method, "apply")  # noqa: B009  (of vLLM's classes, which are not typed)
    try:
        found = apply(layer, x, None)
    except Exception:  # a layer that its model calls in another way
        return None
    return found if isinstance(found, Tensor) else None


def _linear_methods() -> tuple[type, ...]:
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return LinearMethodBase, UnquantizedEmbeddingMethod


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """Of the activations: that of the parameters before they are quantised."""
    named = [getattr(layer, name, None) for name in ("orig_dtype", "params_dtype")]
    held = [t.dtype for t in registered(layer).values()]
    wide = (d for d in (*named, *held) if isinstance(d, torch.dtype) and d.is_floating_point and d.itemsize > 1)
    return next(wide, torch.bfloat16)
