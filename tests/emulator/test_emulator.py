"""The emulator itself: what CUDA allows passes, and each kind of mistake is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from runner_build import CHECKED, PLAIN, UCONTEXT, build_toys

TOYS = Path(__file__).with_name("toys.cu")
RIGHT = {"shuffles": 0, "syncwarp": 0, "atomics": 3 * 2016 + 63, "shallow": 0}
WRONG = {
    "shared": "shared memory overflow: 'second' makes 53248 bytes",
    "ends": r"barrier divergence: .*waits at __syncthreads \(toys.cu:\d+\), but .*thread \(40, 0, 0\) .* has ended",
    "partial warp": "missing lane: .*but lane 8 does not exist",
    "too many": r"bad launch: .*block of \(1056, 1, 1\)",
    "no grid": r"bad launch: .*grid of \(0, 1, 1\)",
}
WRONG_ACCESS = {
    "no syncwarp": "race: .*shared array 'cells'|uninitialised: .*'cells'",
    "locals": r"out of bounds: .*of the local variables of thread \(0, 0, 0\)",
}
WRONG_STACK = {"deep": "memory fault: .*needs more than 65536 bytes of local variables"}


@pytest.mark.parametrize("build", [PLAIN, CHECKED, UCONTEXT], ids=lambda b: b.name)
def test_what_cuda_allows_passes_and_every_mistake_is_named(build, object_cache):
    program = build_toys(build, object_cache, TOYS)
    wrong = {**WRONG, **(WRONG_ACCESS if build.hooked else {}), **({} if build is UCONTEXT else WRONG_STACK)}
    for schedule in "012":
        done = subprocess.run([program, schedule], capture_output=True, text=True)
        said = {name: (int(total), words) for name, total, words in (x.split("|") for x in done.stdout.splitlines())}
        assert {name: said[name] for name in RIGHT if name in said} == {
            name: (total, "") for name, total in RIGHT.items() if name in said
        }
        assert said.keys() >= RIGHT.keys() or build is UCONTEXT, done
        for name, pattern in wrong.items():
            assert re.match(pattern, said[name][1]), (name, said[name])
