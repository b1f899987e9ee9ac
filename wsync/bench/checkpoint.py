"""Checkpoint reload: gather on one rank, write one safetensors file, load it in every engine."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wsync.bench.engine import Engine
from wsync.bench.quantise import encode
from wsync.bench.rows import Outcome, all_parts, empty_part
from wsync.bench.spans import ASSEMBLE, INSTALL, WIRE, Recorder
from wsync.bench.trainer import Trainer
from wsync.errors import ConfigError
from wsync.spec.recipes import PartSpec

_HEADER_BYTES_PER_PART = 256


class CheckpointWriter:
    """The trainers' side.

    Trainer 0 keeps the full model in host memory that is allocated once; the others gather and forget.
    ``encode_here`` is False where the engines quantise: then the file holds the trainer's dtype.
    """

    def __init__(self, trainer: Trainer, recipes: dict[str, str], folder: str, fsync: bool, encode_here: bool) -> None:
        self._trainer = trainer
        self._recipes = recipes if encode_here else dict.fromkeys(recipes, "raw")
        self._folder = Path(folder)
        self._fsync = fsync
        self._writes = trainer.world.side_rank == 0
        parts = all_parts(trainer.shapes(), self._recipes) if self._writes else []
        self._state = {part.name: empty_part(part) for part in parts}
        self._needed_bytes = needed_bytes(parts)
        self._path: Path | None = None

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Gather, quantise, write; the engines start when the file is complete."""
        for name, full in gather(self._trainer, recorder):
            if self._writes:
                with recorder.span("quantise", ASSEMBLE):
                    for part, tensor in encode(name, full, self._recipes[name]):
                        self._state[part].copy_(tensor)
        wire_bytes = self._write(version, recorder) if self._writes else 0
        released = time.monotonic()
        self._trainer.world.barrier()
        return Outcome(released_s=released, wire_bytes=wire_bytes)

    def _write(self, version: int, recorder: Recorder) -> int:
        path = self._path = checkpoint_path(self._folder, version)
        with recorder.span("write", WIRE):
            write_checkpoint(path, self._state, self._needed_bytes)
        if self._fsync:
            with recorder.span("fsync", WIRE):
                fsync_file(path)
        return path.stat().st_size

    def tidy(self) -> None:
        """Remove the file, if this rank wrote one."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._path = None

    def close(self) -> None:
        """Forget the host copy."""
        self._state = {}


class CheckpointLoader:
    """The engines' side: `safe_open` maps the file, so that an engine reads only the pages that its shards touch."""

    def __init__(self, engine: Engine, folder: str, encode_here: bool) -> None:
        self._engine = engine
        self._folder = Path(folder)
        self._encode_here = encode_here

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Wait for the file, then load it with the engine's own loader."""
        with recorder.span("wait for the file"):
            self._engine.world.barrier()
        begin = time.monotonic()
        with recorder.span("load", INSTALL):
            load_checkpoint(self._engine, checkpoint_path(self._folder, version), self._encode_here)
        return Outcome(pause_s=time.monotonic() - begin)

    def tidy(self) -> None:
        """The writer removes the file."""

    def close(self) -> None:
        """Nothing is held."""


def gather(trainer: Trainer, recorder: Recorder) -> Iterator[tuple[str, torch.Tensor]]:
    """`Trainer.full_tensors`, each gather a span: of `ASSEMBLE` on trainer 0, which does the rest of the work as well.

    The others mostly wait in the next gather until trainer 0 comes to it: that is no phase.
    """
    tensors = trainer.full_tensors()
    phase = ASSEMBLE if trainer.world.side_rank == 0 else ""
    while True:
        with recorder.span("gather", phase):
            item = next(tensors, None)
        if item is None:
            return
        yield item


def load_checkpoint(engine: Engine, path: Path, encode_here: bool) -> None:
    """Load a file into the engine; quantise first if the file holds the trainer's dtype."""
    with safe_open(str(path), framework="pt") as file:
        tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a dict)
        if encode_here:
            tensors = (part for name, tensor in tensors for part in encode(name, tensor, engine.recipes[name]))
        engine.load(tensors)


def checkpoint_path(folder: Path, version: int) -> Path:
    """Where the file of a version is."""
    return folder / f"version-{version}.safetensors"


def needed_bytes(parts: list[PartSpec]) -> int:
    """Bytes of a file with these parts, its header estimated from above."""
    return sum(part.nbytes + _HEADER_BYTES_PER_PART for part in parts)


def write_checkpoint(path: Path, state: dict[str, torch.Tensor], size: int) -> None:
    """Write ``state``, after a look at the free space.

    Raises:
        ConfigError: the file does not fit, with the bytes needed and free.
    """
    require_space(path.parent, size)
    try:
        save_file(state, str(path))
    except (OSError, SafetensorError) as e:
        path.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno != errno.ENOSPC:
            raise
        if not isinstance(e, OSError) and "os error 28" not in str(e):
            raise
        raise _full_error(path.parent, size) from e


def require_space(folder: Path, size: int) -> None:
    """Refuse to write ``size`` bytes where there is no room for them.

    Raises:
        ConfigError: with the bytes needed and free.
    """
    if shutil.disk_usage(folder).free < size:
        raise _full_error(folder, size)


def _full_error(folder: Path, size: int) -> ConfigError:
    free = shutil.disk_usage(folder).free
    return ConfigError(
        f"a checkpoint needs {size} bytes in {folder}, but {free} bytes are free",
        hint="give --workdir on a larger filesystem, or leave the row out with --baselines",
    )


def fsync_file(path: Path) -> None:
    """Make the file and its name durable."""
    for target in (path, path.parent):
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
