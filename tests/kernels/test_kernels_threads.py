"""The thread pool: several callers at once, and a child after fork()."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wsync import kernels


def test_several_threads_may_call_at_the_same_time():
    data = np.random.default_rng(0).integers(0, 256, size=5 << 20, dtype=np.uint8)
    expected = [kernels.digest(data.ctypes.data, len(data), word, 1) for word in range(24)]
    with ThreadPoolExecutor(6) as callers:
        got = list(callers.map(lambda word: kernels.digest(data.ctypes.data, len(data), word, 3), range(24)))
    assert got == expected


def test_a_forked_child_starts_workers_of_its_own():
    script = """
        import os
        import numpy as np
        from wsync import kernels

        data = np.arange(8 << 20, dtype=np.uint8)
        before = kernels.digest(data.ctypes.data, len(data), 0, 4)
        child = os.fork()
        if child == 0:
            os._exit(0 if kernels.digest(data.ctypes.data, len(data), 0, 4) == before else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == 0


def test_the_gil_is_released_while_kernels_run():
    data = np.zeros(64 << 20, np.uint8)
    ticks, calling = 0, True

    def call() -> None:
        nonlocal calling
        kernels.digest(data.ctypes.data, len(data), 0, 1, isa="scalar")
        calling = False

    with ThreadPoolExecutor(1) as callers:
        running = callers.submit(call)
        while calling and not running.done():
            ticks += 1
        running.result()
    assert ticks > 100
