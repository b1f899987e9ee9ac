"""The largest magnitudes that scales are made of, in f32. An empty range has 0."""

from __future__ import annotations

import torch
from torch import Tensor


def group_amax(weight: Tensor, group: int) -> Tensor:
    """Of each ``group`` columns of ``[..., K]``: f32 ``[..., K / group]``. ``K`` is a multiple of ``group``."""
    *outer, cols = weight.shape
    return weight.to(torch.float32).abs().reshape(*outer, cols // group, group).amax(dim=-1)


def row_amax(weight: Tensor) -> Tensor:
    """Of each row of ``[..., K]``: f32 ``[..., 1]``."""
    return _with_zero(weight.to(torch.float32).abs()).amax(dim=-1, keepdim=True)


def matrix_amax(weight: Tensor) -> Tensor:
    """Of each matrix of ``[..., N, K]``: f32 ``[...]``."""
    return _with_zero(weight.to(torch.float32).abs().flatten(-2)).amax(dim=-1)


def _with_zero(magnitudes: Tensor) -> Tensor:
    return torch.cat([magnitudes, magnitudes.new_zeros(*magnitudes.shape[:-1], 1)], dim=-1)
