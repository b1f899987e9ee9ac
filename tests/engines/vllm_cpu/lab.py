"""What the tests of a session share: checkpoints, hosts of engines, and what fresh engines hold and say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cpu import models
from vllm_cpu.harness import Dump, Engine, EngineHost


@dataclass(frozen=True)
class Fresh:
    """An engine started from a checkpoint: what every rank holds, and what it generates for `harness.PROMPTS`."""

    dump: Dump
    outputs: list[dict[str, Any]]


class Lab:
    """Makes engines of a family and version, and remembers fresh ones. Close it at the end of the session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hosts: dict[str, EngineHost] = {}
        self._fresh: dict[tuple[str, int, int, str], Fresh] = {}

    def model(self, family: str, version: int) -> Path:
        """The folder of a checkpoint."""
        return models.checkpoint(family, version, self._folder)

    def engine(self, family: str, version: int, *, tp: int = 1, cpu: str = "native", **options: Any) -> Engine:
        """A new engine, for a `with` block."""
        if cpu not in self._hosts:
            self._hosts[cpu] = EngineHost(cpu)
        return Engine(self._hosts[cpu], self.model(family, version), tp=tp, **options)

    def fresh(self, family: str, version: int, *, tp: int = 1, cpu: str = "native") -> Fresh:
        """What an engine holds and says that was started from the checkpoint of the version."""
        key = family, version, tp, cpu
        if key not in self._fresh:
            with self.engine(family, version, tp=tp, cpu=cpu) as engine:
                outputs = engine.generate()  # first: layers make some tables when they first run
                self._fresh[key] = Fresh(engine.dump(), outputs)
        return self._fresh[key]

    def close(self) -> None:
        """End the hosts."""
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()
