"""The e4m3fn codec by table: 127 magnitudes, nearest wins, ties go to the even code.

Bias 7, largest value 448 (0x7e), smallest normal 2^-6, subnormal step 2^-9, NaN 0x7f and 0xff, no infinity.

Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0, E4M3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""The largest finite value."""


def _magnitude(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return (8 + mantissa) * 2.0 ** (exponent - 10)


MAGNITUDES: tuple[float, ...] = tuple(_magnitude(code) for code in range(0x7F))
"""Value of each code from 0x00 to 0x7e."""


def encode_e4m3(values: Tensor) -> Tensor:
    """e4m3fn of finite f32 or f64 ``values``: saturating at 448, to nearest, ties to even, the sign of zero kept.

    Returns:
        A ``torch.float8_e4m3fn`` tensor of the same shape.
    """
    table = torch.tensor(MAGNITUDES, dtype=torch.float64, device=values.device)
    magnitude = values.to(torch.float64).abs().clamp(max=E4M3_MAX)
    upper = torch.searchsorted(table, magnitude).clamp(max=len(MAGNITUDES) - 1)
    lower = (upper - 1).clamp(min=0)
    above, below = table[upper] - magnitude, magnitude - table[lower]
    take_lower = (below < above) | ((below == above) & (lower % 2 == 0))
    code = torch.where(take_lower, lower, upper)
    sign = torch.signbit(values).to(torch.int64) << 7
    return (code | sign).to(torch.uint8).view(torch.float8_e4m3fn)


def decode_e4m3(codes: Tensor) -> Tensor:
    """f32 values of a ``torch.float8_e4m3fn`` (or ``uint8``) tensor; 0x7f and 0xff are NaN."""
    raw = codes.view(torch.uint8).to(torch.int64)
    table = torch.tensor([*MAGNITUDES, float("nan")], dtype=torch.float32, device=codes.device)
    magnitude = table[raw & 0x7F]
    return torch.where(raw >= 0x80, -magnitude, magnitude)
