"""The main job end to end: starts the processes, follows them, and makes the result."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from wsync.bench.cleanup import memory_folder, stop_on_sigterm, temporary_folder
from wsync.bench.events import Began, Repeated
from wsync.bench.launch import Workers
from wsync.bench.limit import best_rate, measure_memcpy
from wsync.bench.machine import describe_machine, filesystem_of, package_versions
from wsync.bench.options import BenchOptions, Fault
from wsync.bench.result import FORMAT_VERSION, Collector, Result, TimedSpan
from wsync.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with what runs, repeats done and repeats in all."""

MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


class Request(msgspec.Struct, frozen=True):
    """What the caller chooses; the rest of `BenchOptions` follows from where the run happens."""

    model: dict[str, Any]
    model_name: str
    num_trainers: int
    num_engines: int
    recipes: tuple[str, ...]
    baselines: tuple[str, ...]
    repeats: int
    transport: str
    quantise_on: str
    workdir: Path | None
    deadline_s: float
    fault: Fault | None = None


def run(request: Request, argv: list[str], progress: Progress) -> tuple[Result, list[TimedSpan]]:
    """Run everything.

    Returns:
        The result, and the spans of all timed repeats for the trace. A wrong verdict is in the result, not raised.

    Raises:
        ConfigError: bad options, or a checkpoint that does not fit on its filesystem.
        WsyncError: a process failed, died or hung; all processes are gone and all files removed.
    """
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    machine = describe_machine()
    rates = [measure_memcpy()]
    with stop_on_sigterm(), _folders(request) as (options, run_dir, conditions):
        collector = Collector(options)
        total = len(options.recipes) * len(options.rows) * (options.repeats + 1)
        done = 0
        with Workers(options, run_dir) as workers:
            for rank, event in workers.events():
                collector.add(rank, event)
                if rank == 0 and isinstance(event, Repeated):
                    done += 1
                if rank == 0 and isinstance(event, Began | Repeated):
                    progress(str(event.step), done, total)
    rates.append(measure_memcpy())
    rate = best_rate(rates)
    rows = collector.rows(rate)
    result = Result(
        format_version=FORMAT_VERSION,
        command="bench e2e",
        argv=argv,
        started_utc=started,
        machine=machine,
        versions=package_versions(),
        options=options,
        conditions=conditions,
        memcpy=rate,
        trainer_bytes=collector.trainer_bytes,
        engine_bytes=collector.engine_bytes,
        rows=rows,
        verdict="ok" if all(row.verdict == "ok" for row in rows) else "wrong",
    )
    return result, collector.spans()


@contextmanager
def _folders(request: Request) -> Iterator[tuple[BenchOptions, Path, dict[str, str]]]:
    """Temporary folders of the run; nothing is left of them."""
    base = choose_workdir(request.workdir)
    with temporary_folder(base) as disk_dir, temporary_folder(memory_folder(base)) as tmpfs_dir:
        with temporary_folder(None) as run_dir:
            options = BenchOptions(
                model=request.model,
                model_name=request.model_name,
                num_trainers=request.num_trainers,
                num_engines=request.num_engines,
                recipes=request.recipes,
                baselines=request.baselines,
                repeats=request.repeats,
                transport=request.transport,
                quantise_on=request.quantise_on,
                disk_dir=str(disk_dir),
                tmpfs_dir=str(tmpfs_dir),
                store_dir=str(run_dir),
                deadline_s=request.deadline_s,
                fault=request.fault,
            )
            yield options, run_dir, _conditions(options)


def choose_workdir(workdir: Path | None) -> Path:
    """Where the ``disk`` baseline writes: what was asked for, else the first of the temporary folder and the current
    one that is not in memory.

    Raises:
        ConfigError: the folder that was asked for is not one.
    """
    if workdir is not None:
        if not workdir.is_dir():
            raise ConfigError(f"--workdir {workdir} is not a folder")
        return workdir
    candidates = [Path(tempfile.gettempdir()), Path.cwd()]
    return next((c for c in candidates if filesystem_of(c)[0] not in MEMORY_FILESYSTEMS), candidates[0])


def _conditions(options: BenchOptions) -> dict[str, str]:
    """What a reader must know of the checkpoint rows."""
    disk, tmpfs = filesystem_of(Path(options.disk_dir))[0], filesystem_of(Path(options.tmpfs_dir))[0]
    return {
        "disk": f"{disk}, file and folder fsynced before the engines load, page cache warm",
        "tmpfs": f"{tmpfs}, no fsync",
        "baselines quantise on": f"the {options.quantise_on}s",
    }
