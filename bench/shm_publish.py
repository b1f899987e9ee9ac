"""Publishes of plain tensors over shared memory between processes: what the simulator is held against."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROWS, COLUMNS = 1024, 2048
"""Of every tensor: 4 MiB of bf16."""
DEADLINE_S = 180.0
IDLE_S = 3600.0


@dataclass(frozen=True)
class Layout:
    """Who takes part.

    Attributes:
        num_tensors: of ``ROWS x COLUMNS`` bf16 on every trainer rank.
        num_trainers: ranks that all hold everything.
        num_replicas: engines of one rank.
        recipe: on the wire.
    """

    num_tensors: int
    num_trainers: int = 1
    num_replicas: int = 1
    recipe: str = "fp8_block128"


class Job:
    """Processes that publish when they are told to, and sleep meanwhile. Leave it with ``close``."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        import wsync

        context = multiprocessing.get_context("spawn")
        key_file = str(wsync.new_key_file(folder / f"{id(layout)}.key"))
        store = f"tcp://127.0.0.1:{_free_port()}"
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(layout.num_trainers):
            pipe, child = context.Pipe()
            self._pipes.append(pipe)
            self._processes.append(context.Process(target=_train, args=(layout, rank, store, key_file, child)))
        for i in range(layout.num_replicas):
            self._processes.append(context.Process(target=_serve, args=(layout, i, store, key_file), daemon=True))
        for process in self._processes:
            process.start()

    def publish(self) -> dict[str, Any]:
        """The report of one publish: seconds by phase, and bytes."""
        for pipe in self._pipes:
            pipe.send(True)
        reports = [pipe.recv() for pipe in self._pipes]
        return dict(reports[0])

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes[: len(self._pipes)]:
            process.join(DEADLINE_S)
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()


def measure_together(layouts: dict[str, Layout], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The reports of ``repeats`` publishes of each layout, after two that warm up.

    Layouts take turns, so that what else the machine does meanwhile is the same for all.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: Job(layout, Path(folder)) for name, layout in layouts.items()}
        try:
            rounds = [{name: job.publish() for name, job in jobs.items()} for _ in range(repeats + 2)]
        finally:
            for job in jobs.values():
                job.close()
    return {name: [one[name] for one in rounds[2:]] for name in layouts}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tensors(layout: Layout) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(ROWS, COLUMNS, generator=generator).to(torch.bfloat16)
    return {f"layer{i}.weight": block.clone() for i in range(layout.num_tensors)}


def _train(layout: Layout, rank: int, store: str, key_file: str, pipe: Connection) -> None:
    import wsync

    with wsync.Source(
        _tensors(layout),
        store=store,
        key_file=key_file,
        rank=rank,
        world_size=layout.num_trainers,
        transport="shm",
        recipe=layout.recipe,
        num_threads=1,
        join_deadline_s=DEADLINE_S,
    ) as source:
        version = 0
        while pipe.recv():
            version += 1
            report = source.publish(version, min_replicas=layout.num_replicas, deadline_s=DEADLINE_S).wait_committed()
            time.sleep(0.02)  # engines go back to waiting
            pipe.send({"seconds": report.seconds, "wire_bytes": report.wire_bytes})


def _serve(layout: Layout, idx: int, store: str, key_file: str) -> None:
    import torch

    import wsync
    from wsync.spec.recipes import get_recipe

    recipe = get_recipe(layout.recipe)
    live: dict[str, Any] = {}
    for name, tensor in _tensors(layout).items():
        if recipe.quantised:
            live[name] = torch.zeros(ROWS, COLUMNS, dtype=torch.float8_e4m3fn)
            live[name + "_scale_inv"] = torch.zeros(ROWS // 128, COLUMNS // 128)
        else:
            live[name] = torch.zeros_like(tensor)
    with wsync.Sink(
        live, store=store, key_file=key_file, replica=f"engine-{idx}", num_threads=1, join_deadline_s=DEADLINE_S
    ) as sink:
        while True:
            sink.commit(sink.prepare(IDLE_S))
