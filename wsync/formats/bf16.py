"""bf16 by its bits: rounding to nearest, ties to even."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_bf16(values: Tensor) -> Tensor:
    """bf16 of finite f32 ``values``, to nearest, ties to even. An overflow becomes infinite.

    In integers, so that it does not lean on the cast that it is compared with.
    """
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + odd) >> 16) & 0xFFFF
    signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16)
    return signed.view(torch.bfloat16)
