"""The real libwsync_cuda.so, built by nvcc, end to end on a stand-in for CUDA's runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from standin_build import PACKAGE, build_standin, missing_standin

HERE = Path(__file__).parent


@pytest.mark.skipif(bool(missing_standin()), reason=f"the stand-in {missing_standin()}")
def test_the_library_that_nvcc_built_gives_the_bytes_of_the_cpu_on_the_stand_in(object_cache, tmp_path):
    build_standin(object_cache, tmp_path)
    path = os.pathsep.join(map(str, (HERE, HERE.parent / "kernels", PACKAGE.parent)))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    child = [sys.executable, str(HERE / "standin_child.py"), "5"]
    done = subprocess.run(child, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "True ['the emulator of wsync'] "
    assert lines[1:-1] == [], done.stderr[-2000:]
    assert int(lines[-1].removeprefix("scenarios: ")) > 100
