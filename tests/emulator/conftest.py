"""Runners of emulated kernels, built once for a session and kept in pytest's cache."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # kernel_boxes

from runner_build import CHECKED, PLAIN, SANITIZED, build_runner, missing  # noqa: E402


@pytest.fixture(scope="session")
def object_cache(request, tmp_path_factory):
    if reason := missing():
        pytest.skip(f"the emulator {reason}")
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("wsync-emulator") if cache is not None else tmp_path_factory.mktemp("wsync-emulator")


@pytest.fixture(scope="session", params=[PLAIN, CHECKED, SANITIZED], ids=lambda b: b.name)
def runner(request, object_cache):
    """(path, build) of each kind of runner."""
    return build_runner(request.param, object_cache), request.param
