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


def test_work_is_done_by_fewer_threads_where_no_more_can_be_started():
    script = """
        import resource
        import numpy as np
        from wsync import kernels

        data = np.arange(8 << 20, dtype=np.uint8)
        before = kernels.digest(data.ctypes.data, len(data), 0, 1)
        mapped = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (mapped, mapped))  # a thread has no room for its stack
        raise SystemExit(kernels.digest(data.ctypes.data, len(data), 0, 4) != before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_ends_while_daemon_threads_are_inside_kernels():
    script = """
        import threading
        import time
        import numpy as np
        from wsync import kernels
        from wsync.plan.descriptors import PACK_DESC, UNPACK_DESC

        nbytes = 8 << 20
        a, b = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        pack, unpack = np.zeros(1, PACK_DESC), np.zeros(1, UNPACK_DESC)
        pack["src"], unpack["dst"] = a.ctypes.data, a.ctypes.data
        for desc, stride in ((pack, "src_stride"), (unpack, "dst_stride")):
            desc[stride], desc["extent"], desc["elem_bytes"] = (0, 0, 0, 1), (1, 1, 1, nbytes), 1
        unpack["src_stride"] = unpack["dst_stride"]
        calls = {
            "pack": lambda: kernels.pack(pack, b.ctypes.data, 1),
            "unpack": lambda: kernels.unpack(unpack, b.ctypes.data, 1),
            "installed_digest": lambda: kernels.installed_digest(unpack, 1),
            "digest": lambda: kernels.digest(a.ctypes.data, nbytes, 0, 1),
            "memcpy": lambda: kernels.memcpy(b.ctypes.data, a.ctypes.data, nbytes, 2),
            "zero_digest": lambda: kernels.zero_digest(0, nbytes),
        }
        began = []

        def forever(name):
            calls[name]()
            began.append(name)
            while True:
                calls[name]()

        for name in calls:
            threading.Thread(target=forever, args=(name,), daemon=True).start()
        while len(began) < len(calls):
            time.sleep(0.01)
        print("main ends")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "main ends\n", "")


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
