"""Writes block128.npz from the reference arithmetic of `wsync.formats`: ``python tests/golden/make_golden.py``.

The file is committed. It changes only when a recipe gets a new name: the codes are a promise to engines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from wsync.formats import digest_bytes, quantize_reference

PATH = Path(__file__).with_name("block128.npz")
RECIPES = ("fp8_block128", "fp8_block128_f32")


def bf16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)


def ties() -> np.ndarray:
    """Every e4m3 magnitude, the halfway point above it and its bf16 neighbours, in a block with amax 448."""
    codes = torch.arange(0x7E, dtype=torch.uint8)
    low = codes.view(torch.float8_e4m3fn).to(torch.float32)
    high = (codes + 1).view(torch.float8_e4m3fn).to(torch.float32)
    middle = ((low + high) / 2).to(torch.bfloat16).view(torch.int16)
    values = torch.cat([low, high, *[(middle + d).view(torch.bfloat16).to(torch.float32) for d in (-1, 0, 1)]])
    matrix = np.zeros((16, 80), np.float32)
    matrix.reshape(-1)[: 2 * len(values)] = torch.cat([values, -values]).numpy()
    return matrix


def inputs() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(20261123)
    normal = rng.standard_normal((130, 140)) * 0.02
    heavy = np.sign(normal) * np.exp(rng.standard_normal(normal.shape) * 6 - 12)
    edges = np.zeros((8, 128 * 8), np.float32)
    edges[0, ::128] = [0, 1e-6, 1e-4, 448, 1e37, 2.0**-120, 3.0e38, 1.5]
    edges[1] = -0.0
    edges[2] = edges[0].max(axis=0) * 2.0**-9
    edges[3] = np.repeat(edges[0, ::128], 128) * rng.uniform(-1, 1, 1024)
    f32 = torch.from_numpy((rng.standard_normal((40, 150)) * 0.05).astype(np.float32))
    return {"normal": bf16(normal), "heavy": bf16(heavy), "edges": bf16(edges), "ties": bf16(ties()), "f32": f32}


def make() -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, weight in inputs().items():
        out[f"{name}/input"] = weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32).numpy()
        for recipe in RECIPES:
            parts = quantize_reference(weight, recipe)
            out[f"{name}/{recipe}/weight"] = parts["weight"].view(torch.uint8).numpy()
            out[f"{name}/{recipe}/weight_scale_inv"] = parts["weight_scale_inv"].numpy()
    data = np.arange(1003, dtype=np.uint8)
    out["digest/data"] = data
    out["digest/first_word"] = np.array([0, 1, 123456789], np.uint64)
    out["digest/digest"] = np.array([digest_bytes(data, int(w)) for w in out["digest/first_word"]], np.uint64)
    return out


if __name__ == "__main__":
    np.savez_compressed(PATH, **make())
