"""Recipe ``nvfp4``: e2m1 weights, two in a byte, with scales of two levels.

One f32 ``scale_2`` for each matrix (or for all matrices of a scale group), one e4m3 ``scale`` for each 16 columns of a
row. In f32 and with one rounding at each step::

    scale_2 = amax / 2688                          2688 = 6 * 448; 1 where the quotient is 0
    s = amax16 / (6 * scale_2)                     1 where the quotient is 0
    scale = rne_e4m3(min(max(s, 2 ** -9), 448))
    q = e2m1(x / (scale * scale_2))                true division

Source: ModelOpt ``NVFP4QTensor.get_weights_scaling_factor_2``, ``get_weights_scaling_factor`` and ``_cast_fp4``. They
divide zero by zero for a matrix of zeros; here its ``scale_2`` is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsync.formats.amax import group_amax
from wsync.formats.e2m1 import E2M1_MAX, decode_e2m1, encode_e2m1, pack_codes, unpack_codes
from wsync.formats.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3
from wsync.spec.recipes import NVFP4_GROUP

LEAST_BLOCK_SCALE = 2.0**-9
"""The least e4m3 value but zero."""


def _f32(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def scale_2_of_amax(amax: Tensor) -> Tensor:
    """The second level of f32 ``amax``, of the same shape."""
    scale_2 = amax.to(torch.float32) / _f32(E2M1_MAX * E4M3_MAX, amax)
    return torch.where(scale_2 == 0, _f32(1.0, amax), scale_2)


def block_scales(amax: Tensor, scale_2: Tensor) -> Tensor:
    """e4m3 scales of f32 block ``amax [..., N, K / 16]`` under f32 ``scale_2 [...]``."""
    scale = amax / (_f32(E2M1_MAX, amax) * scale_2)[..., None, None]
    scale = torch.where(scale == 0, _f32(1.0, amax), scale)
    return encode_e4m3(scale.clamp(min=LEAST_BLOCK_SCALE, max=E4M3_MAX))


def element_scales(scales: Tensor, scale_2: Tensor) -> Tensor:
    """f32 ``[..., N, K]``: what each weight is divided by; the product of both levels, one rounding."""
    product = decode_e4m3(scales) * scale_2[..., None, None]
    return product.repeat_interleave(NVFP4_GROUP, dim=-1)


def quantize_nvfp4(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``weight [..., N, K]`` with f32 ``amax [...]``: bytes ``[..., N, K / 2]``, scales, ``scale_2 [..., 1]``."""
    scale_2 = scale_2_of_amax(amax)
    scales = block_scales(group_amax(weight, NVFP4_GROUP), scale_2)
    codes = encode_e2m1(weight.to(torch.float32) / element_scales(scales, scale_2))
    return pack_codes(codes), scales, scale_2[..., None]


def dequantize_nvfp4(packed: Tensor, scales: Tensor, scale_2: Tensor) -> Tensor:
    """f32 weight: ``q * (scale * scale_2)``, two roundings."""
    return decode_e2m1(unpack_codes(packed)) * element_scales(scales, scale_2[..., 0])
