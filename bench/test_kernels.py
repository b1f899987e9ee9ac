"""Single kernel operations on one core and on all: GB/s of source bytes read, and the ratio to memcpy in the same run.

``pytest bench/test_kernels.py --benchmark-only``; ``make record-kernels`` writes the committed record. Arrays are far
larger than the caches; a rate is that of the fastest round; memcpy is measured right before and after. A quantising
rate counts the bf16 bytes that are read, once even where a first pass finds the amax; a dequantising rate counts the
bf16 bytes that are written. ``extra_info`` of every benchmark holds ``gbps``, ``memcpy_gbps``, ``ratio_to_memcpy`` and,
after its checks, ``correct``: digests agree with the bytes, and a part of the bytes with what the scalar kernels write.
``bar`` is the ratio that one core has to reach. Results are asserted always, bars only with the environment variable
``WSYNC_BENCH_STRICT=1``: on a busy machine they say nothing.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from kernel_arrays import PACK_CASES, QUANTISED, SOURCE_BYTES, Arrays

from wsync import kernels

BUCKET_BYTES = 4 << 20
ROUNDS = 7
SHAPES = {"8192x8192": (8192, 8192), "3072x1024": (3072, 1024)}
CHECKED_ROWS = 512
BARS = {
    "bf16": 0.8,
    "fp8_block128": 0.40,
    "mxfp8": 0.40,
    "fp8_block128_f32": 0.30,
    "fp8_channel": 0.30,
    "fp8_tensor": 0.30,
    "nvfp4": 0.15,
    "unpack": 0.70,
    "digest": 0.80,
}
"""Ratio to memcpy that one core should reach."""
STRICT = os.environ.get("WSYNC_BENCH_STRICT") == "1"


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


def measure(benchmark, arrays: Arrays, call, nbytes: int, name: str, num_threads: int, check) -> None:
    """Times ``call``, checks its results with ``check``, and compares with the bar of ``name``."""
    before = memcpy_gbps(arrays, num_threads)
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    if not benchmark.disabled:
        limit = max(before, memcpy_gbps(arrays, num_threads))
        gbps = nbytes / benchmark.stats.stats.min / 1e9
        benchmark.extra_info.update(gbps=round(gbps, 2), ratio_to_memcpy=round(gbps / limit, 3))
        benchmark.extra_info.update(memcpy_gbps=round(limit, 2), isa=kernels.best_isa(), num_threads=num_threads)
    check()
    if benchmark.disabled:
        return
    benchmark.extra_info["correct"] = True
    if num_threads == 1 and name in BARS:
        benchmark.extra_info["bar"] = BARS[name]
        assert not STRICT or gbps / limit >= BARS[name], f"{name}: {gbps:.1f} GB/s, memcpy {limit:.1f} GB/s"


def pack_all(arrays: Arrays, descs: np.ndarray, dst: np.ndarray, num_threads: int, isa: str = "auto"):
    """With the pass that finds the amax of each matrix, where the recipe needs it."""
    if descs["amax"].any():
        regions = arrays.amax_descs(descs)
        arrays.amax[: len(descs)] = 0
        assert kernels.amax(regions, num_threads, isa=isa) is None
        kernels.scales_from_amax(regions)
    return kernels.pack(descs, dst.ctypes.data, num_threads, isa=isa)


def check_first_rows(arrays: Arrays, descs: np.ndarray, halves: int) -> None:
    """The same digest, bytes and scales as those of the scalar kernels."""
    head = descs[:1].copy()
    head["extent"][:, 2] = min(CHECKED_ROWS, int(head["extent"][0, 2]))
    nbytes = int(head["extent"].prod()) // 2 * halves
    seen = []
    for isa in ("auto", "scalar"):
        arrays.dst[:nbytes], arrays.scales[:nbytes] = 0, 0
        packed = pack_all(arrays, head, arrays.dst, 1, isa)
        seen.append((packed, arrays.dst[:nbytes].tobytes(), arrays.scales[:nbytes].tobytes()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", PACK_CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack(benchmark, arrays, num_threads, shape, name):
    case = PACK_CASES[name]
    descs = arrays.pack_descs(case, *SHAPES[shape])
    nbytes = 2 * int(descs["extent"].prod(axis=1).sum())

    def call():
        return pack_all(arrays, descs, arrays.dst, num_threads)

    def check() -> None:
        packed = call()
        assert packed == (kernels.digest(arrays.dst.ctypes.data, nbytes // 4 * case.halves, 0, isa="scalar"), None)
        check_first_rows(arrays, descs, case.halves)

    measure(benchmark, arrays, call, nbytes, name, num_threads, check)


def test_pack_of_one_bucket_at_a_time(benchmark, arrays, num_threads):
    """A call for each 4 MiB of fp8: what a sender does."""
    rows, cols = BUCKET_BYTES // 1024, 1024
    descs = arrays.pack_descs(PACK_CASES["fp8_block128"], rows, cols)

    def call() -> int:
        one_by_one = (kernels.pack(descs[i : i + 1], arrays.dst.ctypes.data, num_threads) for i in range(len(descs)))
        return sum(packed.digest for packed in one_by_one) % 2**64

    def check() -> None:
        assert call() == kernels.pack(descs, arrays.dst.ctypes.data, num_threads, isa="scalar").digest

    measure(benchmark, arrays, call, 2 * len(descs) * rows * cols, "fp8_block128", num_threads, check)


@pytest.mark.parametrize("name", QUANTISED)
def test_dequantise(benchmark, arrays, num_threads, name):
    packs = arrays.pack_descs(PACK_CASES[name], *SHAPES["3072x1024"])
    assert pack_all(arrays, packs, arrays.codes, num_threads).bad is None
    descs = arrays.dequantise_descs(packs, arrays.dst.ctypes.data)
    nbytes = 2 * int(descs["extent"].prod(axis=1).sum())

    def check() -> None:
        one = 2 * int(descs["extent"][0].prod())
        seen = []
        for isa in ("auto", "scalar"):
            arrays.dst[:one] = 0
            assert kernels.transform(descs[:1], num_threads, isa=isa) is None
            seen.append(arrays.dst[:one].tobytes())
        assert seen[0] == seen[1]
        back, given = (
            np.frombuffer(b, np.uint16).astype(np.uint32) << 16 for b in (seen[0], arrays.src[:one].tobytes())
        )
        assert np.abs(back.view(np.float32) - given.view(np.float32)).max() < 0.02

    measure(benchmark, arrays, lambda: kernels.transform(descs, num_threads), nbytes, "dequantise", num_threads, check)


@pytest.mark.parametrize("cols", [1024, 512], ids=["whole_rows", "half_rows"])
def test_unpack(benchmark, arrays, num_threads, cols):
    descs = arrays.unpack_descs(2048, cols, 1024)
    nbytes = 2 * len(descs) * 2048 * cols

    def call() -> int:
        return kernels.unpack(descs, arrays.src.ctypes.data, num_threads)

    def check() -> None:
        assert call() == kernels.digest(arrays.src.ctypes.data, nbytes, 0, isa="scalar")
        assert call() == kernels.installed_digest(descs, num_threads, isa="scalar")

    measure(benchmark, arrays, call, nbytes, "unpack", num_threads, check)


def test_digest(benchmark, arrays, num_threads):
    def call() -> int:
        return kernels.digest(arrays.src.ctypes.data, SOURCE_BYTES, 0, num_threads)

    def check() -> None:
        assert call() == kernels.digest(arrays.src.ctypes.data, SOURCE_BYTES, 0, isa="scalar")

    measure(benchmark, arrays, call, SOURCE_BYTES, "digest", num_threads, check)


def test_installed_digest(benchmark, arrays, num_threads):
    descs = arrays.unpack_descs(2048, 512, 1024)

    def call() -> int:
        return kernels.installed_digest(descs, num_threads)

    def check() -> None:
        assert call() == kernels.installed_digest(descs, num_threads, isa="scalar")

    measure(benchmark, arrays, call, 2 * len(descs) * 2048 * 512, "installed_digest", num_threads, check)
