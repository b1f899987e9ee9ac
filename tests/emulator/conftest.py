"""Runners of emulated kernels, built once for a session and kept in pytest's cache."""

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # kernel_boxes

from runner_build import CHECKED, PLAIN, SANITIZED, build_runner, missing


@pytest.fixture(scope="session")
def object_cache(request, tmp_path_factory):
    if reason := missing():
        pytest.skip(f"the emulator {reason}")
    cache = getattr(request.config, "cache", None)
    if cache is None:
        return tmp_path_factory.mktemp("wsync-emulator")
    objects = cache.mkdir("wsync-emulator")
    forget_old_files(objects)
    return objects


def forget_old_files(objects, days=3):
    """What sources of other days became."""
    for path in objects.iterdir():
        if time.time() - path.stat().st_mtime > days * 86400:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="session", params=[PLAIN, CHECKED, SANITIZED], ids=lambda b: b.name)
def runner(request, object_cache):
    """(path, build) of each kind of runner."""
    return build_runner(request.param, object_cache), request.param
