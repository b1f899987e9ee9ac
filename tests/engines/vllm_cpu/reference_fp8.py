"""Block fp8 on a CPU without AMX: vLLM's kernel for it needs AMX, so a plain one is put in front of it.

For engine processes only: it imports vLLM. The weight and its scales stay as the loader left them, which is what GPU
kernels with f32 scales see as well.
"""

from __future__ import annotations

import torch
import vllm.model_executor.kernels.linear as kernels
from torch import Tensor
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.platforms import PlatformEnum

_BLOCK = 128


class ReferenceFp8BlockKernel(CPUFp8BlockScaledMMKernel):
    """Dequantises the weight at every call. Inputs stay bf16."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is repacked."""

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: object) -> Tensor:
        params = self._get_layer_params(layer)
        return torch.nn.functional.linear(x, dequantized(params.weight, params.block_scale, x.dtype), bias)


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` `[N, K]` in e4m3 times ``scale`` `[ceil(N/128), ceil(K/128)]`, rounded to ``dtype``."""
    num_rows, num_columns = weight.shape
    scales = scale.float().repeat_interleave(_BLOCK, 0)[:num_rows].repeat_interleave(_BLOCK, 1)[:, :num_columns]
    return (weight.float() * scales).to(dtype)


def install() -> None:
    """Prefer the reference kernel. May be called again."""
    possible = kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if ReferenceFp8BlockKernel not in possible:
        possible.insert(0, ReferenceFp8BlockKernel)
