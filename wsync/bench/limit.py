"""The limit: how fast the machine could move the bytes at all, measured in the same run."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable

import msgspec

_TOTAL_BYTES = 1 << 29
_MIN_BYTES = 16 << 20
_ROUNDS = 4


class MemcpyRate(msgspec.Struct, frozen=True):
    """What copying memory with all cores reaches.

    Attributes:
        gbps: bytes copied per nanosecond, the best round (each byte is read once and written once).
        num_cores: threads that copied at the same time.
        copier: which function was fastest.
        rounds_gbps: every round, by function.
    """

    gbps: float
    num_cores: int
    copier: str
    rounds_gbps: dict[str, list[float]]


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_seconds(trainer_bytes: int, engine_bytes: int, rate: MemcpyRate) -> float:
    """Seconds for reading what the trainers hold and writing what the engines hold, once each, with all cores.

    A copy of ``n`` bytes reads ``n`` and writes ``n``, hence the half.
    """
    return (trainer_bytes + engine_bytes) / 2 / (rate.gbps * 1e9)


def measure_memcpy(rounds: int = _ROUNDS, total_bytes: int = _TOTAL_BYTES) -> MemcpyRate:
    """Copy between buffers that no cache holds, on all cores at once; the faster of libc's and our own copy."""
    cores = num_cores()
    per_core = max(_MIN_BYTES, total_bytes // cores)
    buffers = [(_buffer(per_core), _buffer(per_core)) for _ in range(cores)]
    measured = {name: _rounds(copy, buffers, per_core, rounds) for name, copy in _copiers().items()}
    copier = max(measured, key=lambda name: max(measured[name]))
    return MemcpyRate(max(measured[copier]), cores, copier, measured)


def best_rate(rates: list[MemcpyRate]) -> MemcpyRate:
    """Before and after the rows: the faster one is the stricter limit."""
    best = max(rates, key=lambda rate: rate.gbps)
    rounds = {name: [r for rate in rates for r in rate.rounds_gbps[name]] for name in best.rounds_gbps}
    return MemcpyRate(best.gbps, best.num_cores, best.copier, rounds)


def _copiers() -> dict[str, Callable[[int, int, int], object]]:
    libc = ctypes.CDLL(None)
    libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libc.memcpy.restype = ctypes.c_void_p
    copiers: dict[str, Callable[[int, int, int], object]] = {"libc memcpy": libc.memcpy}
    try:
        from wsync import _C
    except ImportError:
        return copiers
    if hasattr(_C, "memcpy"):
        copiers["wsync memcpy"] = _one_thread_copy(_C.memcpy)
    return copiers


def _one_thread_copy(copy: Callable[..., object]) -> Callable[[int, int, int], object]:
    return lambda dst, src, size: copy(dst, src, size, 1)


def _buffer(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    ctypes.memset(_address(memory), 1, size)  # an untouched page would be copied from the one page of zeros
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _rounds(
    copy: Callable[[int, int, int], object], buffers: list[tuple[mmap.mmap, mmap.mmap]], size: int, rounds: int
) -> list[float]:
    rates = []
    for _ in range(rounds):
        start = threading.Barrier(len(buffers) + 1)
        threads = [
            threading.Thread(target=_copy_one, args=(copy, _address(dst), _address(src), size, start))
            for src, dst in buffers
        ]
        for thread in threads:
            thread.start()
        start.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        rates.append(size * len(buffers) / (time.perf_counter() - begin) / 1e9)
    return rates


def _copy_one(copy: Callable[[int, int, int], object], dst: int, src: int, size: int, start: threading.Barrier) -> None:
    start.wait()
    copy(dst, src, size)
