"""The trainer side of the benchmark: a Hugging Face model, sharded with FSDP2, that changes at every version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from wsync.bench.weights import CONTENT_BITS, build_model, change_content, fill, local_part
from wsync.bench.world import World

NUM_CONTENTS = len(CONTENT_BITS)
"""Versions cycle through this many different weights: a stale byte of either of the last two versions shows."""


class Trainer:
    """One FSDP2 rank.

    Attributes:
        model: in bf16, sharded over the trainers by `torch.distributed.fsdp.fully_shard`.
    """

    def __init__(self, world: World, config: dict[str, Any]) -> None:
        self.world = world
        self.model = build_model(config)
        _shard(self.model, world)
        fill(self.model, world.side_rank)
        self._content = 0

    @property
    def local_bytes(self) -> int:
        """Bytes of this rank's shards."""
        return sum(local_part(p).nbytes for p in self.model.parameters())

    def set_version(self, version: int) -> None:
        """Change every element of every parameter in place, as an optimizer step does; a function of ``version``."""
        content = version % NUM_CONTENTS
        change_content(self.model.parameters(), self._content, content)
        self._content = content

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather one parameter after the other, on all trainers at once (`DTensor.full_tensor`)."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                yield name, _full(parameter)

    def shapes(self) -> list[tuple[str, list[int], str]]:
        """Name, global shape and dtype of every parameter, tied ones once."""
        return [(n, list(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in self.model.named_parameters()]


def _shard(model: nn.Module, world: World) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(world.trainers, "cpu")
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach()
