"""Recipe ``fp8_tensor``: e4m3 weights with one f32 scale for each matrix, or for all matrices of a scale group.

In f32 and with one rounding at each step::

    r = (1 / max(amax, 1e-12)) * 448
    scale = 1 / r
    q = rne_e4m3(x * r)

Source: SGLang ``input_to_float8``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsync.formats.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3

TENSOR_AMAX_FLOOR = 1e-12
"""Matrices with a smaller amax are scaled as if they had this one."""


def multiplier_of_amax(amax: Tensor) -> Tensor:
    """What values are multiplied by, for f32 ``amax``, of the same shape."""
    floored = amax.to(torch.float32).clamp(min=TENSOR_AMAX_FLOOR)
    return (torch.ones_like(floored) / floored) * torch.tensor(E4M3_MAX, dtype=torch.float32, device=amax.device)


def quantize_tensor(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[..., N, K]`` of ``weight`` and its f32 scales ``[...]`` for f32 ``amax [...]``."""
    multiplier = multiplier_of_amax(amax)
    codes = encode_e4m3(weight.to(torch.float32) * multiplier[..., None, None])
    return codes, torch.ones_like(multiplier) / multiplier


def dequantize_tensor(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 weight: ``q * scale``, one rounding."""
    return decode_e4m3(codes) * scales[..., None, None]
