"""Single kernel operations on one core and on all: GB/s of source bytes read, and the ratio to memcpy in the same run.

``pytest bench/test_kernels.py --benchmark-only``. Arrays are far larger than the caches; a rate is that of the fastest
round; memcpy is measured right before and after. ``extra_info`` of every benchmark holds ``gbps``, ``memcpy_gbps`` and
``ratio_to_memcpy``, and ``bar`` where one core has to reach a ratio. Results are asserted always, bars only with the
environment variable ``WSYNC_BENCH_STRICT=1``: on a busy machine they say nothing.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from wsync import kernels
from wsync.plan.descriptors import (
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    UNPACK_DESC,
)

SOURCE_BYTES = 128 << 20
BUCKET_BYTES = 4 << 20
ROUNDS = 7
SHAPES = {"8192x8192": (8192, 8192), "3072x1024": (3072, 1024)}
PACK_OPS = {
    "copy": (OP_COPY, SRC_BYTES, 2),
    "copy_checked": (OP_COPY, SRC_BF16, 2),
    "bf16": (OP_BF16, SRC_BF16, 2),
    "fp8_block128": (OP_FP8_BLOCK128, SRC_BF16, 1),
    "fp8_block128_f32": (OP_FP8_BLOCK128_F32, SRC_BF16, 1),
}
BARS = {"bf16": 0.8, "fp8_block128": 0.40, "unpack": 0.8, "digest": 1.0}
"""Ratio to memcpy that one core should reach."""
STRICT = os.environ.get("WSYNC_BENCH_STRICT") == "1"


def aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + 4096, np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + nbytes]


class Arrays:
    """bf16 Gaussian weights, and room for what is made of them."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * np.float32(0.02)
        self.src = aligned(SOURCE_BYTES)
        self.src.view(np.uint16)[:] = np.resize((values.view(np.uint32) >> 16).astype(np.uint16), SOURCE_BYTES // 2)
        self.dst = aligned(SOURCE_BYTES)
        self.dst[:] = 0
        self.scales = np.zeros(SOURCE_BYTES // 2 // 128, np.float32)

    def pack_descs(self, op: int, src_dtype: int, out_bytes: int, rows: int, cols: int) -> np.ndarray:
        numel = rows * cols
        descs = np.zeros(SOURCE_BYTES // (2 * numel), PACK_DESC)
        i = np.arange(len(descs), dtype=np.uint64)
        descs["src"] = np.uint64(self.src.ctypes.data) + i * np.uint64(2 * numel)
        descs["src_stride"] = (0, 0, cols, 1)
        descs["extent"] = (1, 1, rows, cols)
        descs["dst_offset"] = i * np.uint64(out_bytes * numel)
        descs["wire_word"] = descs["dst_offset"] // 8
        descs["scales"] = np.uint64(self.scales.ctypes.data) + i * np.uint64(4 * (numel // 16384))
        descs["scale_stride"] = cols // 128
        descs["op"], descs["src_dtype"], descs["elem_bytes"] = op, src_dtype, 2
        return descs

    def unpack_descs(self, rows: int, cols: int, stride: int) -> np.ndarray:
        numel = rows * cols
        descs = np.zeros(SOURCE_BYTES // (2 * rows * stride), UNPACK_DESC)
        i = np.arange(len(descs), dtype=np.uint64)
        descs["dst"] = np.uint64(self.dst.ctypes.data) + i * np.uint64(2 * rows * stride)
        descs["dst_stride"] = (0, 0, stride, 1)
        descs["src_stride"] = (0, 0, cols, 1)
        descs["extent"] = (1, 1, rows, cols)
        descs["src_offset"] = i * np.uint64(2 * numel)
        descs["wire_word"] = descs["src_offset"] // 8
        descs["elem_bytes"] = 2
        return descs


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return Arrays()


@pytest.fixture(scope="module", params=[1, 0], ids=["one_core", "all_cores"])
def num_threads(request) -> int:
    return request.param


def memcpy_gbps(arrays: Arrays, num_threads: int) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        kernels.memcpy(arrays.dst.ctypes.data, arrays.src.ctypes.data, SOURCE_BYTES, num_threads)
        seconds.append(time.perf_counter() - begin)
    return SOURCE_BYTES / min(seconds) / 1e9


def measure(benchmark, arrays: Arrays, call, nbytes: int, name: str, num_threads: int) -> None:
    before = memcpy_gbps(arrays, num_threads)
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    limit = max(before, memcpy_gbps(arrays, num_threads))
    gbps = nbytes / benchmark.stats.stats.min / 1e9
    benchmark.extra_info.update(gbps=round(gbps, 2), ratio_to_memcpy=round(gbps / limit, 3))
    benchmark.extra_info.update(memcpy_gbps=round(limit, 2), isa=kernels.best_isa())
    if num_threads == 1 and name in BARS:
        benchmark.extra_info["bar"] = BARS[name]
        assert not STRICT or gbps / limit >= BARS[name], f"{name}: {gbps:.1f} GB/s, memcpy {limit:.1f} GB/s"


@pytest.mark.parametrize("name", PACK_OPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack(benchmark, arrays, num_threads, shape, name):
    descs = arrays.pack_descs(*PACK_OPS[name], *SHAPES[shape])
    nbytes = 2 * int(descs["extent"].prod(axis=1).sum())
    call = lambda: kernels.pack(descs, arrays.dst.ctypes.data, num_threads)  # noqa: E731
    measure(benchmark, arrays, call, nbytes, name, num_threads)
    packed = call()
    assert packed.bad is None
    assert packed == kernels.pack(descs, arrays.dst.ctypes.data, num_threads, isa="scalar")


def test_pack_of_one_bucket_at_a_time(benchmark, arrays, num_threads):
    """A call for each 4 MiB of fp8: what a sender does."""
    rows, cols = BUCKET_BYTES // 1024, 1024
    descs = arrays.pack_descs(OP_FP8_BLOCK128, SRC_BF16, 1, rows, cols)

    def call() -> int:
        one_by_one = (kernels.pack(descs[i : i + 1], arrays.dst.ctypes.data, num_threads) for i in range(len(descs)))
        return sum(packed.digest for packed in one_by_one) % 2**64

    measure(benchmark, arrays, call, 2 * len(descs) * rows * cols, "fp8_block128", num_threads)
    assert call() == kernels.pack(descs, arrays.dst.ctypes.data, num_threads).digest


@pytest.mark.parametrize("cols", [1024, 512], ids=["whole_rows", "half_rows"])
def test_unpack(benchmark, arrays, num_threads, cols):
    descs = arrays.unpack_descs(2048, cols, 1024)
    nbytes = 2 * len(descs) * 2048 * cols
    call = lambda: kernels.unpack(descs, arrays.src.ctypes.data, num_threads)  # noqa: E731
    measure(benchmark, arrays, call, nbytes, "unpack", num_threads)
    assert call() == kernels.digest(arrays.src.ctypes.data, nbytes, 0, isa="scalar")
    assert call() == kernels.installed_digest(descs, num_threads)


def test_digest(benchmark, arrays, num_threads):
    call = lambda: kernels.digest(arrays.src.ctypes.data, SOURCE_BYTES, 0, num_threads)  # noqa: E731
    measure(benchmark, arrays, call, SOURCE_BYTES, "digest", num_threads)
    assert call() == kernels.digest(arrays.src.ctypes.data, SOURCE_BYTES, 0, isa="scalar")


def test_installed_digest(benchmark, arrays, num_threads):
    descs = arrays.unpack_descs(2048, 512, 1024)
    call = lambda: kernels.installed_digest(descs, num_threads)  # noqa: E731
    measure(benchmark, arrays, call, 2 * len(descs) * 2048 * 512, "installed_digest", num_threads)
    assert call() == kernels.installed_digest(descs, num_threads, isa="scalar")
