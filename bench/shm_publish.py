"""Publishes of plain tensors over shared memory, between processes of this machine: what the simulator is held against."""

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
DEADLINE_S = 60.0


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


def measure(layout: Layout, repeats: int) -> list[dict[str, Any]]:
    """The reports of ``repeats`` publishes after one that warms up: seconds by phase and bytes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        import wsync

        key_file = str(wsync.new_key_file(Path(folder) / "wsync.key"))
        port = _free_port()
        store = f"tcp://127.0.0.1:{port}"
        parent, child = context.Pipe()
        ranks = [
            context.Process(target=_train, args=(layout, rank, store, key_file, repeats, child if rank == 0 else None))
            for rank in range(layout.num_trainers)
        ]
        engines = [
            context.Process(target=_serve, args=(layout, i, store, key_file, repeats))
            for i in range(layout.num_replicas)
        ]
        for process in (*ranks, *engines):
            process.start()
        try:
            reports = parent.recv()
        finally:
            for process in (*ranks, *engines):
                process.join(DEADLINE_S)
                if process.is_alive():
                    process.kill()
    return list(reports)


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


def _train(layout: Layout, rank: int, store: str, key_file: str, repeats: int, pipe: Connection | None) -> None:
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
    ) as source:
        reports = []
        for version in range(1, repeats + 2):
            report = source.publish(version, min_replicas=layout.num_replicas, deadline_s=DEADLINE_S).wait_committed()
            time.sleep(0.05)  # engines go back to waiting
            reports.append(
                {"seconds": report.seconds, "wire_bytes": report.wire_bytes, "sink_bytes": report.sink_bytes}
            )
        if pipe is not None:
            pipe.send(reports[1:])


def _serve(layout: Layout, idx: int, store: str, key_file: str, repeats: int) -> None:
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
    with wsync.Sink(live, store=store, key_file=key_file, replica=f"engine-{idx}", num_threads=1) as sink:
        for _ in range(repeats + 1):
            sink.commit(sink.prepare(DEADLINE_S))


if __name__ == "__main__":
    for layout in (
        Layout(1),
        Layout(32),
        Layout(96),
        Layout(32, 2, 1),
        Layout(32, 1, 2),
        Layout(32, recipe="bf16"),
        Layout(96, 1, 2, "bf16"),
    ):
        for report in measure(layout, 3):
            print(layout, {k: round(v, 4) for k, v in report["seconds"].items()}, report["wire_bytes"])
