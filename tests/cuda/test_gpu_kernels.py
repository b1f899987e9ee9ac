"""The CUDA kernels on a GPU give the CPU kernels' bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wsync
from wsync import kernels
from wsync.errors import NonFiniteError
from wsync.formats import digest_bytes
from wsync.plan.descriptors import UNPACK_DESC

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]

RECIPES = ("bf16", "fp8_block128", "fp8_block128_f32", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((128, 128), (300, 384), (1, 16384), (3, 40000), (2, 96, 160), (7, 33, 96))


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    values.view(-1)[::7] *= 1e-4
    values.view(-1)[::11] = -0.0
    return values.to(dtype)


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.cpu().contiguous().reshape(-1).view(torch.uint8)


def same_parts(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, part in want.items():
        assert got[name].shape == part.shape, name
        assert torch.equal(raw(got[name]), raw(part)), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_recipe_gives_the_bits_of_the_cpu(recipe, dtype, shape):
    if (recipe == "mxfp8" and shape[-1] % 32) or (recipe == "nvfp4" and shape[-1] % 16):
        pytest.skip("no whole groups")
    weight = weights(shape, dtype, len(recipe))
    want = wsync.quantize(weight, recipe, backend="cpu")
    same_parts(wsync.quantize(weight.cuda(), recipe, backend="cuda"), want)
    strided = weight.cuda().transpose(-1, -2).contiguous().transpose(-1, -2)
    same_parts(wsync.quantize(strided, recipe, backend="cuda"), want)


@pytest.mark.parametrize("recipe", RECIPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_gives_the_bits_of_the_cpu(recipe, dtype):
    parts = wsync.quantize(weights((256, 384), torch.float32, 3), recipe, backend="cpu")
    want = wsync.dequantize(parts, recipe, dtype, backend="cpu")
    got = wsync.dequantize({name: part.cuda() for name, part in parts.items()}, recipe, dtype, backend="cuda")
    assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_value_that_is_not_finite_is_named(recipe):
    weight = weights((256, 384), torch.bfloat16, 5)
    weight[200, 7] = float("inf")
    weight[130, 300] = float("nan")
    with pytest.raises(NonFiniteError, match=r"\(130, 300\)"):
        wsync.quantize(weight.cuda(), recipe, backend="cuda")


def test_unpacking_and_digests_give_the_bits_of_the_cpu():
    from wsync.kernels.cuda import CudaKernels

    on_gpu = CudaKernels(torch.device("cuda", torch.cuda.current_device()))
    bucket = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    staged = bucket.cuda()
    assert on_gpu.digest(staged.data_ptr(), 1000003, 17) == digest_bytes(bucket[:1000003].numpy(), 17)
    for width in (64, 63):
        target, there = torch.zeros(300, 80, dtype=torch.int16), torch.zeros(300, 80, dtype=torch.int16).cuda()
        desc = np.zeros(1, UNPACK_DESC)
        desc["dst_stride"], desc["src_stride"] = (0, 0, 80, 1), (0, 0, width, 1)
        desc["extent"], desc["elem_bytes"], desc["wire_word"] = (1, 1, 300, width), 2, 5
        desc["dst"] = target.data_ptr()
        want = kernels.unpack(desc, bucket.data_ptr())
        assert kernels.installed_digest(desc) == want
        desc["dst"] = there.data_ptr()
        assert on_gpu.unpack(desc, staged.data_ptr()) == want
        assert torch.equal(there.cpu(), target)
        assert on_gpu.installed_digest(desc) == want
