"""The CUDA kernels on a GPU: GB/s of traffic, and the share of what a device-to-device copy reaches in the same run.

``pytest bench/test_gpu_kernels.py --benchmark-only -m gpu``. Traffic is bytes read and written, with scales. Rates are
those of the fastest round, timed with events on the stream; the codes are compared with the CPU's once.
"""

from __future__ import annotations

import pytest
import torch

import wsync
from wsync.kernels.matrices import _addresses, _empty_parts, _pack_descs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]

RECIPES = ("bf16", "fp8_block128", "fp8_block128_f32", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4")
SHAPE = (32768, 8192)
ROUNDS = 20


def fastest_s(work) -> float:
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def copy_gbps(weight: torch.Tensor) -> float:
    target = torch.empty_like(weight)
    return 2 * weight.nbytes / fastest_s(lambda: target.copy_(weight)) / 1e9


@pytest.mark.parametrize("recipe", RECIPES)
def test_packing_on_the_gpu(benchmark, recipe):
    from wsync.kernels.cuda import compile_pack

    weight = (torch.randn(SHAPE, device="cuda") * 0.02).to(torch.bfloat16)
    matrices = _addresses(weight)
    parts = _empty_parts(weight, recipe)
    descs = _pack_descs(weight, matrices, recipe, parts)
    cells = weight.abs().amax().to(torch.float32).reshape(1)
    descs["amax"] = cells.data_ptr()
    program = compile_pack(descs, weight.device)
    base = parts["weight"].data_ptr()
    benchmark.pedantic(lambda: (program.run(base), torch.cuda.synchronize()), rounds=3)
    traffic = weight.nbytes + sum(part.nbytes for part in parts.values())
    gbps = traffic / fastest_s(lambda: program.run(base)) / 1e9
    benchmark.extra_info.update(gbps=gbps, copy_gbps=copy_gbps(weight), device=torch.cuda.get_device_name())
    benchmark.extra_info["share_of_copy"] = gbps / benchmark.extra_info["copy_gbps"]
    print(f"{recipe}: {gbps:.0f} GB/s, {benchmark.extra_info['share_of_copy']:.0%} of a copy")  # noqa: T201
    want = wsync.quantize(weight.cpu(), recipe, backend="cpu")
    assert torch.equal(parts["weight"].cpu().view(torch.uint8), want["weight"].view(torch.uint8))
