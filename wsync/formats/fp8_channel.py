"""Recipe ``fp8_channel``: e4m3 weights with one f32 scale for each row (output channel).

In f32 and with one rounding at each step::

    scale = max(amax / 448, 1 / (448 * 512))       true division
    q = rne_e4m3(x / scale)                        true division

Source: vLLM ``Fp8PtpcOnlineLinearMethod`` (``_fp8_channel_scale``, ``_fp8_quant_per_channel``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsync.formats.amax import row_amax
from wsync.formats.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3

LEAST_SCALE = 1.0 / (448.0 * 512.0)


def scales_of_row_amax(amax: Tensor) -> Tensor:
    """Scales of f32 ``amax``, of the same shape."""
    most = torch.tensor(E4M3_MAX, dtype=torch.float32, device=amax.device)
    return (amax.to(torch.float32) / most).clamp(min=LEAST_SCALE)


def quantize_rows_with_scales(weight: Tensor, scales: Tensor) -> Tensor:
    """e4m3 of ``weight [..., N, K]`` (values as given) for f32 ``scales [..., N, 1]`` that are known."""
    return encode_e4m3(weight.to(torch.float32) / scales)


def quantize_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[..., N, K]`` of ``weight`` and its f32 scales ``[..., N, 1]``."""
    scales = scales_of_row_amax(row_amax(weight))
    return quantize_rows_with_scales(weight, scales), scales


def dequantize_channel(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 weight: ``q * scale``, one rounding."""
    return decode_e4m3(codes) * scales
