"""A worker that a test can hold at a place of its choice, to kill it there or to let it go on. For engine processes."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from vllm_cpu.extension import EngineProbe
from wsync.session.install import Installer

PLACES = {
    "staging": "verify",  # a bucket has come; on the sink's thread, while the engine generates
    "half installed": "finish",  # some tensors are of the new version, others not; on the engine's thread
}


class HoldingProbe(EngineProbe):
    """As `EngineProbe`."""

    def wsync_test_hold(self, place: str, file: str) -> None:
        """Once, when the worker comes to the place: make the file, and go on when it is gone."""
        name = PLACES[place]
        original = getattr(Installer, name)

        @functools.wraps(original)
        def held(*args: Any) -> Any:
            setattr(Installer, name, original)
            Path(file).touch()
            while Path(file).exists():
                time.sleep(0.01)
            return original(*args)

        setattr(Installer, name, held)
