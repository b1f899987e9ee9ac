"""Recipe ``mxfp8``: e4m3 weights with one E8M0 byte for each 32 columns of a row.

In f32 and with one rounding at each step::

    e = the least power of two at or above amax / 448, as a byte      true division (the rule RCEIL)
    q = rne_e4m3(x * 2 ** (127 - e))                                  exact but for the last step

Source: torchao ``to_mx`` with ``ScaleCalculationMode.RCEIL``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsync.formats.amax import group_amax
from wsync.formats.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3
from wsync.formats.e8m0 import decode_e8m0, encode_e8m0_ceil
from wsync.spec.recipes import MXFP8_GROUP


def scales_of_group_amax(amax: Tensor) -> Tensor:
    """E8M0 bytes of f32 ``amax``, of the same shape."""
    return encode_e8m0_ceil(amax.to(torch.float32) / torch.tensor(E4M3_MAX, dtype=torch.float32, device=amax.device))


def quantize_mxfp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[..., N, K]`` of ``weight`` and its ``uint8`` scales ``[..., N, K / 32]``."""
    scales = scales_of_group_amax(group_amax(weight, MXFP8_GROUP))
    powers = decode_e8m0(scales)
    inverse = (torch.ones_like(powers) / powers).repeat_interleave(MXFP8_GROUP, dim=-1)
    return encode_e4m3(weight.to(torch.float32) * inverse), scales


def dequantize_mxfp8(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 weight: ``q * 2 ** (e - 127)``; exact but where it is subnormal."""
    return decode_e4m3(codes) * decode_e8m0(scales).repeat_interleave(MXFP8_GROUP, dim=-1)
