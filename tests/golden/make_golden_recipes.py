"""Writes recipes.npz from the reference arithmetic of `wsync.formats`: ``python tests/golden/make_golden_recipes.py``.

The file is committed. It changes only when a recipe gets a new name: the codes are a promise to engines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from make_golden import bf16

from wsync.formats import quantize_reference, requantize_e8m0_reference

PATH = Path(__file__).with_name("recipes.npz")
RECIPES = ("fp8_channel", "fp8_tensor", "mxfp8", "nvfp4")
GROUP_AMAX = 0.1953125
"""The amax of the scale group that the input ``normal`` is encoded in a second time."""


def edges() -> np.ndarray:
    """Rows of one scenario each: powers of two and their neighbours, ties of both codes, tiny values, zeros."""
    rows = np.zeros((16, 32), np.float32)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], np.float32)
    rows[0, :8], rows[0, 8:16] = ties, -ties
    rows[1, :8], rows[1, 16:24] = ties * 1.0078125, ties * 0.99609375
    for i, top in enumerate((448.0, 450.0, 446.0, 7 * 2.0**-20, 2.0**-118, 2.0**-126, 2.0**-133, 3e38, 1e-4, 1.0)):
        rows[2 + i] = top * np.linspace(-1, 1, 32) ** 3
    rows[13] = -0.0
    rows[14, 0], rows[14, 31] = 1e-6, -1e-9
    rows[15, ::2] = 240.0  # halfway between codes under the scale of 448
    return rows


def inputs() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(20261129)
    normal = (rng.standard_normal((21, 96)) * 0.02).clip(-0.19, 0.19)
    heavy = np.sign(normal) * np.exp(rng.standard_normal(normal.shape) * 4 - 8)
    f32 = (rng.standard_normal((2, 9, 64)) * 0.05).astype(np.float32)
    return {
        "normal": bf16(normal),
        "heavy": bf16(heavy),
        "edges": bf16(edges()),
        "f32": torch.from_numpy(f32),
        "f16": torch.from_numpy(f32[0]).to(torch.float16),
    }


def as_bytes(part: torch.Tensor) -> np.ndarray:
    """The part as an array that numpy can save: bytes of 8-bit types, f32 as it is."""
    return (part.view(torch.uint8) if part.element_size() == 1 else part).numpy()


def make() -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, weight in inputs().items():
        out[f"{name}/input"] = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).numpy()
        for recipe in RECIPES:
            for part, value in quantize_reference(weight, recipe).items():
                out[f"{name}/{recipe}/{part}"] = as_bytes(value)
    for recipe in ("fp8_tensor", "nvfp4"):
        for part, value in quantize_reference(inputs()["normal"], recipe, amax=GROUP_AMAX).items():
            out[f"group/{recipe}/{part}"] = as_bytes(value)
    given = quantize_reference(inputs()["heavy"], "fp8_block128_f32")
    for name, pair in (("given", given.values()), ("requant", requantize_e8m0_reference(*given.values()))):
        for part, value in zip(given, pair, strict=True):
            out[f"{name}/{part}"] = as_bytes(value)
    return out


if __name__ == "__main__":
    np.savez_compressed(PATH, **make())
