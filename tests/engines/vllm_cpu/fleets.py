"""What the tests on fleets of real servers share: a trainer, servers that start together, and what they are told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import wsync
import wsync.plan.types
from vllm_cpu import models
from vllm_cpu.server import Server

DEADLINE_S = 60.0
APPEAR_S = 120.0


class Trainer:
    """The trainer's memory of a family, and a `wsync.Source` over it. A context manager.

    Args:
        family: of the model.
        folder: where the job's key is, or is made.
        store: to bind.
        bucket_bytes: small ones make a version of a tiny model travel in several buckets.
    """

    def __init__(
        self, family: str, folder: Path, *, store: str = "tcp://127.0.0.1:0", bucket_bytes: int = 4 << 20
    ) -> None:
        self.family = family
        self.key_file = folder / "wsync.key"
        if not self.key_file.exists():
            wsync.new_key_file(self.key_file)
        self.weights = {name: torch.zeros_like(t) for name, t in models.tensors(family, 0).items()}
        self.source = wsync.Source(
            self.weights,
            store=store,
            key_file=self.key_file,
            rank=0,
            world_size=1,
            num_threads=1,
            options=wsync.plan.types.PlanOptions(bucket_bytes=bucket_bytes),
        )

    def train_to(self, version: int) -> None:
        """The optimizer's step: every weight is written in place."""
        self.write(models.tensors(self.family, version))

    def write(self, weights: dict[str, Tensor]) -> None:
        """Write these weights in place."""
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)

    def wait_joined(self, replica: str) -> None:
        """Wait until all ranks of the replica are seen and awake."""
        end = time.monotonic() + APPEAR_S
        while time.monotonic() < end:
            status = self.source.replicas().get(replica)
            if status is not None and status.complete and not status.asleep:
                return
            time.sleep(0.05)
        raise TimeoutError(f"{replica} is not there after {APPEAR_S:g} s: {self.source.replicas()}")

    def close(self) -> None:
        """Leave. May be called twice."""
        self.source.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def servers(*arguments: dict[str, Any]) -> Iterator[list[Server]]:
    """Servers with the backend, started at the same time; each gets its arguments of `Server`."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Server(**{"backend": "wsync", "wait": False} | given)) for given in arguments]
        for server in made:
            server.wait_healthy()
        yield made


def again(server: Server, model_dir: Path, options: tuple[str, ...] = ()) -> Server:
    """A new server at the address of one that is gone. The caller waits for it."""
    new = Server(model_dir, backend="wsync", options=(*options, "--port", str(server.port)), wait=False)
    new.port, new.url = server.port, server.url
    return new
