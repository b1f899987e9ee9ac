"""Recipes ``fp8_block128`` and ``fp8_block128_f32``: e4m3 weights with one f32 scale for each 128 x 128 block.

For a block with the largest magnitude ``amax``, in f32 and with one rounding at each step::

    s = max(amax, 1e-4) / 448                      true division
    scale = s                                      fp8_block128_f32
    scale = the power of two at or above s         fp8_block128
    q = rne_e4m3(x * (1 / scale))

The scale is the multiplier that gives the weight back: ``w ~ q * scale``. Blocks at the lower and right edge are padded
with zeros, which changes nothing. With a power of two every step but the last is exact.

Source: DeepGEMM ``per_block_cast_to_fp8(use_ue8m0=True)`` for ``fp8_block128``, vLLM ``per_block_cast_to_fp8`` for
``fp8_block128_f32``; both as they run on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsync.formats.e4m3 import decode_e4m3, encode_e4m3
from wsync.spec.recipes import SCALE_BLOCK

AMAX_FLOOR = 1e-4
"""Blocks with a smaller amax are scaled as if they had this one."""


def block_amax(weight: Tensor) -> Tensor:
    """Largest magnitude of each 128 x 128 block of the last two dimensions of ``weight``, in f32."""
    *batch, rows, cols = weight.shape
    grid_rows, grid_cols = -(-rows // SCALE_BLOCK), -(-cols // SCALE_BLOCK)
    padded_shape = (*batch, grid_rows * SCALE_BLOCK, grid_cols * SCALE_BLOCK)
    padded = torch.zeros(padded_shape, dtype=torch.float32, device=weight.device)
    padded[..., :rows, :cols] = weight.to(torch.float32).abs()
    return padded.view(*batch, grid_rows, SCALE_BLOCK, grid_cols, SCALE_BLOCK).amax(dim=(-3, -1))


def scales_of_amax(amax: Tensor, power_of_two: bool) -> Tensor:
    """Scales of f32 ``amax`` by the rule of the recipe; the power of two is found in the bits, which is exact."""
    scale = amax.to(torch.float32).clamp(min=AMAX_FLOOR) / torch.tensor(448.0, dtype=torch.float32, device=amax.device)
    if not power_of_two:
        return scale
    bits = scale.contiguous().view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def expand_scales(scales: Tensor, shape: torch.Size) -> Tensor:
    """One scale for each element of a weight of ``shape``."""
    rows, cols = shape[-2:]
    wide = scales.repeat_interleave(SCALE_BLOCK, dim=-2).repeat_interleave(SCALE_BLOCK, dim=-1)
    return wide[..., :rows, :cols]


def quantize_with_scales(weight: Tensor, scales: Tensor) -> Tensor:
    """e4m3 of ``weight`` (f32 values as given) for scales that are known."""
    inverse = torch.ones_like(scales) / scales
    return encode_e4m3(weight.to(torch.float32) * expand_scales(inverse, weight.shape))


def quantize_block128(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """e4m3 weight of the shape of ``weight`` and its f32 scales."""
    scales = scales_of_amax(block_amax(weight), power_of_two)
    return quantize_with_scales(weight, scales), scales


def dequantize_block128(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 weight: ``q * scale``, one rounding."""
    return decode_e4m3(codes) * expand_scales(scales, codes.shape)
