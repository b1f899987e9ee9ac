"""The E8M0 codec: a byte ``e`` is the power of two ``2 ** (e - 127)``; 0xff is NaN. There is no zero and no sign.

Byte 0 is ``2 ** -127``, a subnormal f32 that some hardware takes for zero.

Source: OCP Microscaling Formats (MX) Specification 1.0, E8M0.
"""

from __future__ import annotations

import torch
from torch import Tensor

E8M0_BIAS = 127


def encode_e8m0_ceil(values: Tensor) -> Tensor:
    """``uint8`` bytes of the least powers of two at or above finite f32 ``values >= 0``; byte 0 is the least of all."""
    bits = values.to(torch.float32).contiguous().view(torch.int32)
    exponent = bits >> 23
    normal = exponent + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    subnormal = (bits > 0x400000).to(torch.int32)  # 0x400000 is 2^-127
    return torch.where(exponent > 0, normal, subnormal).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """f32 powers of two of ``uint8`` (or ``float8_e8m0fnu``) bytes; 0xff is NaN."""
    powers = [2.0 ** (e - E8M0_BIAS) for e in range(255)]
    table = torch.tensor([*powers, float("nan")], dtype=torch.float32, device=codes.device)
    return table[codes.view(torch.uint8).to(torch.int64)]
