"""The e2m1 codec by table: eight magnitudes, nearest wins, ties go to the even code; and two codes in a byte.

The values are 0, 0.5, 1, 1.5, 2, 3, 4 and 6; there is no NaN and no infinity. The sign bit is that of ``value < 0``: a
small negative value that rounds to zero keeps it, -0 loses it.

Source: OCP Microscaling Formats (MX) Specification 1.0, FP4 E2M1; the sign of zero as in ModelOpt
``NVFP4QTensor._cast_fp4``.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
"""The largest value."""

MAGNITUDES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Value of each code from 0 to 7."""


def encode_e2m1(values: Tensor) -> Tensor:
    """e2m1 codes of f32 or f64 ``values``, one in a byte: saturating at 6, to nearest, ties to even; a NaN becomes 0.

    Returns:
        A ``torch.uint8`` tensor of the same shape with codes from 0 to 15.
    """
    table = torch.tensor(MAGNITUDES, dtype=torch.float64, device=values.device)
    magnitude = values.to(torch.float64).abs().nan_to_num(nan=0.0).clamp(max=E2M1_MAX).contiguous()
    upper = torch.searchsorted(table, magnitude).clamp(max=len(MAGNITUDES) - 1)
    lower = (upper - 1).clamp(min=0)
    above, below = table[upper] - magnitude, magnitude - table[lower]
    take_lower = (below < above) | ((below == above) & (lower % 2 == 0))
    code = torch.where(take_lower, lower, upper)
    return (code | ((values < 0).to(torch.int64) << 3)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """f32 values of codes from 0 to 15, one in a byte."""
    table = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int64)]


def pack_codes(codes: Tensor) -> Tensor:
    """``uint8 [..., K / 2]`` of codes ``[..., K]``: the low nibble is the even column. ``K`` is even."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Codes ``uint8 [..., K]`` of ``[..., K / 2]`` bytes."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
