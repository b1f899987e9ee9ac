"""Runs scenarios through the real CUDA library on the stand-in, in a process of its own: prints what is wrong."""

from __future__ import annotations

import sys

import numpy as np
import scenarios
from cases import Outcome

from wsync.native import load_extension

NO_BAD = 2**64 - 1


def compiled(extension, case):
    by_call = {
        "pack": "cuda_pack",
        "amax": "cuda_amax",
        "scales": "cuda_scales_from_amax",
        "unpack": "cuda_unpack",
        "installed": "cuda_installed_digest",
        "transform": "cuda_transform",
    }
    if case.call == "digest":
        return extension.cuda_digest(*(int(v) for v in case.descs))
    return getattr(extension, by_call[case.call])(case.descs)


def aligned_copy(data: np.ndarray) -> np.ndarray:
    raw = np.empty(len(data) + 16, np.uint8)
    start = -raw.ctypes.data % 16
    raw[start : start + len(data)] = data
    return raw[start : start + len(data)]


def mistake(extension, scenario) -> str:
    case = scenario.case
    for name, array in case.outputs.items():  # what the CPU kernels have just written
        array[:] = np.frombuffer(scenario.initial[name], np.uint8)
    program = compiled(extension, case)
    result = aligned_copy(np.zeros(16, np.uint8))
    data = aligned_copy(np.frombuffer(program.bytes.tobytes(), np.uint8))
    program.run(data.ctypes.data, case.base, result.ctypes.data, 0)
    digest, bad = (int(v) for v in result.view(np.uint64))
    found = None if bad == NO_BAD else (bad >> 40, bad & (2**40 - 1))
    contents = {name: array.tobytes() for name, array in case.outputs.items()}
    return scenario.mistake(Outcome("", digest, found, contents))


def main() -> int:
    extension = load_extension()
    found = extension.cuda_probe()
    print(found["available"], [device["name"] for device in found["devices"]], found["reason"])  # noqa: T201
    total = 0
    for make in scenarios.ALL:
        for scenario in make(int(sys.argv[1])):
            total += 1
            if said := mistake(extension, scenario):
                print("mistake:", said)  # noqa: T201
    print("scenarios:", total)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
