"""Bytes that must never change: our own vectors, and those that other projects' quantisers made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden import PATH, RECIPES, inputs, make

from wsync import kernels

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
SOURCES = {
    "fp8_block128": ("deepseek-ai/DeepGEMM", "per_block_cast_to_fp8.ue8m0=True"),
    "fp8_block128_f32": ("vllm-project/vllm", "per_block_cast_to_fp8.f32scale"),
}
BACKENDS = ("reference", "cpu")
GOLDEN = np.load(PATH)


def weight_of(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16 if bits.dtype == np.int16 else torch.float32)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", sorted(inputs()))
def test_kernels_write_the_golden_bytes(name, recipe, isa, monkeypatch):
    monkeypatch.setenv("WSYNC_ISA", isa)
    parts = kernels.quantize(weight_of(GOLDEN[f"{name}/input"]), recipe, "cpu")
    assert np.array_equal(parts["weight"].view(torch.uint8).numpy(), GOLDEN[f"{name}/{recipe}/weight"])
    assert np.array_equal(parts["weight_scale_inv"].numpy(), GOLDEN[f"{name}/{recipe}/weight_scale_inv"])


def test_the_generator_still_makes_the_golden_file():
    fresh = make()
    assert sorted(fresh) == sorted(GOLDEN.files)
    for name, array in fresh.items():
        assert np.array_equal(array.view(np.uint8), GOLDEN[name].view(np.uint8)), name


def test_the_digest_of_the_golden_bytes_is_the_golden_digest():
    data = GOLDEN["digest/data"]
    for first_word, digest in zip(GOLDEN["digest/first_word"], GOLDEN["digest/digest"], strict=True):
        assert kernels.digest(data.ctypes.data, len(data), int(first_word)) == int(digest)


def test_ties_go_to_the_even_code():
    weight = weight_of(GOLDEN["ties/input"]).to(torch.float64)
    got = torch.from_numpy(GOLDEN["ties/fp8_block128/weight"])
    assert GOLDEN["ties/fp8_block128/weight_scale_inv"].tolist() == [[1.0]]
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    middle = (values[:-1] + values[1:]) / 2
    at_tie = torch.isin(weight.abs(), middle)
    assert int(at_tie.sum()) >= 2 * len(middle)
    assert bool((got[at_tie] % 2 == 0).all())


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_equal_the_quantisers_of_the_engines(recipe, backend):
    index = json.loads((VECTORS / "index.json").read_text())
    blobs = np.load(VECTORS / "vectors.npz")
    compared = 0
    for entry in index["entries"]:
        if (entry["repo"], entry["id"]) != SOURCES[recipe] or entry["mode"] != "cpu" or "nonfinite" in entry["input"]:
            continue
        parts = kernels.quantize(weight_of(blobs[index["inputs"][entry["input"]]["blob"]]), recipe, backend)
        codes, scales = (blobs[entry["outputs"][part]["blob"]] for part in ("q", "scale"))
        assert np.array_equal(parts["weight"].view(torch.uint8).numpy(), codes), entry["input"]
        assert np.array_equal(parts["weight_scale_inv"].numpy(), scales), entry["input"]
        compared += 1
    assert compared == 2
