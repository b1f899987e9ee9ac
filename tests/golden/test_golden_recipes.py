"""Bytes of the recipes that must never change: codes and scales by channel, by tensor, mxfp8, nvfp4, requantised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_golden_recipes import GROUP_AMAX, PATH, RECIPES, as_bytes, inputs, make

from wsync import kernels
from wsync.formats import quantize_reference

GOLDEN = np.load(PATH)


def weight_of(name: str) -> torch.Tensor:
    bits, like = GOLDEN[f"{name}/input"], inputs()[name]
    return torch.from_numpy(bits).view(like.dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", sorted(inputs()))
def test_every_backend_writes_the_golden_bytes_of_the_recipe(name, recipe, backend):
    parts = kernels.quantize(weight_of(name), recipe, backend)
    assert {f"{name}/{recipe}/{part}" for part in parts} == {
        k for k in GOLDEN.files if k.startswith(f"{name}/{recipe}/")
    }
    for part, value in parts.items():
        expected = GOLDEN[f"{name}/{recipe}/{part}"]
        assert (value.shape, as_bytes(value).tobytes()) == (expected.shape, expected.tobytes()), part


@pytest.mark.parametrize("recipe", ["fp8_tensor", "nvfp4"])
def test_a_scale_group_has_the_golden_bytes(recipe):
    for part, value in quantize_reference(weight_of("normal"), recipe, amax=GROUP_AMAX).items():
        assert as_bytes(value).tobytes() == GOLDEN[f"group/{recipe}/{part}"].tobytes(), part
    assert GOLDEN[f"group/{recipe}/weight"].tobytes() != GOLDEN[f"normal/{recipe}/weight"].tobytes()


def test_the_generator_still_makes_the_golden_file_of_the_recipes():
    fresh = make()
    assert sorted(fresh) == sorted(GOLDEN.files)
    for name, array in fresh.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            GOLDEN[name].dtype,
            GOLDEN[name].shape,
            GOLDEN[name].tobytes(),
        ), name
