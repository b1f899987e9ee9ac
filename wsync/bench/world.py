"""One gloo world of all trainers and engines, as the baselines and the barriers between repeats need it."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from wsync.bench.options import BenchOptions


class World:
    """The process groups of one rank.

    Attributes:
        options: of the run.
        rank: of the whole world; trainers come first.
        is_trainer: which side this rank is on.
        side_rank: rank within the side.
        trainers: the trainers' group.
        receivers: trainer 0 and all engines.
    """

    def __init__(self, options: BenchOptions, rank: int) -> None:
        self.options = options
        self.rank = rank
        self.is_trainer = rank < options.num_trainers
        self.side_rank = rank if self.is_trainer else rank - options.num_trainers
        timeout = datetime.timedelta(seconds=options.deadline_s)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{options.store_dir}/gloo",
            rank=rank,
            world_size=options.world_size,
            timeout=timeout,
        )
        self.trainers = dist.new_group(list(range(options.num_trainers)), timeout=timeout)
        self.receivers = dist.new_group([0, *range(options.num_trainers, options.world_size)], timeout=timeout)

    @property
    def name(self) -> str:
        """``trainer 0`` and so on."""
        return self.options.rank_name(self.rank)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def share(self, value: Any, src: int) -> Any:
        """Give every rank the JSON value of rank ``src``."""
        data = msgspec.json.encode(value) if self.rank == src else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, src)
        if self.rank == src:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(buffer, src)
        return msgspec.json.decode(buffer.numpy().tobytes())

    def close(self) -> None:
        """Leave the world."""
        dist.destroy_process_group()
