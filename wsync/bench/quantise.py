"""The quantiser of the baselines: plain eager torch, as training frameworks have it.

It shares no code with `wsync.formats` or `wsync.kernels`, so that the verdict compares two implementations.
"""

from __future__ import annotations

import torch

from wsync.errors import RecipeError

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def quantise_block128(weight: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight to e4m3 with one scale for each block of 128 by 128.

    Args:
        weight: ``[N, K]`` bf16 or f32.
        power_of_two: round scales up to a power of two (``fp8_block128``), or not (``fp8_block128_f32``).

    Returns:
        ``[N, K]`` float8_e4m3fn and ``[ceil(N / 128), ceil(K / 128)]`` float32, a multiplier.

    Source: DeepGEMM ``per_block_cast_to_fp8``; with f32 scales vLLM's function of that name.
    """
    rows, cols = weight.shape
    grid = (-(-rows // BLOCK), -(-cols // BLOCK))
    padded = torch.nn.functional.pad(weight, (0, grid[1] * BLOCK - cols, 0, grid[0] * BLOCK - rows))
    blocks = padded.view(grid[0], BLOCK, grid[1], BLOCK)
    amax = blocks.abs().amax(dim=(1, 3)).float().clamp(AMAX_FLOOR)
    scale = amax / E4M3_MAX
    if power_of_two:
        scale = _ceil_to_power_of_two(scale)
    encoded = (blocks.float() * (1.0 / scale).view(grid[0], 1, grid[1], 1)).to(torch.float8_e4m3fn)
    return encoded.view_as(padded)[:rows, :cols].contiguous(), scale


def _ceil_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    bits = scale.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def encode(name: str, weight: torch.Tensor, recipe: str) -> list[tuple[str, torch.Tensor]]:
    """The parts of one tensor under their checkpoint names.

    Raises:
        RecipeError: the baselines do not know the recipe.
    """
    if recipe == "raw":
        return [(name, weight)]
    if recipe == "bf16":
        return [(name, weight.to(torch.bfloat16))]
    if recipe not in ("fp8_block128", "fp8_block128_f32"):
        raise RecipeError(f"the baselines cannot encode {name!r} as {recipe!r}")
    encoded, scale = quantise_block128(weight, power_of_two=recipe == "fp8_block128")
    return [(name, encoded), (name + "_scale_inv", scale)]
