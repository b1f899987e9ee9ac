"""Gather on trainer 0, then gloo broadcasts to every engine: one for each tensor, or packed into buckets."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import torch
import torch.distributed as dist

from wsync.bench.checkpoint import gather
from wsync.bench.engine import Engine
from wsync.bench.options import BUCKET_BYTES
from wsync.bench.quantise import encode
from wsync.bench.rows import Outcome, as_bytes
from wsync.bench.spans import ASSEMBLE, INSTALL, WIRE, Recorder
from wsync.bench.trainer import Trainer
from wsync.spec.recipes import PartSpec

_ALIGNMENT = 256


class PartSender:
    """The trainers' side of ``broadcast``: gather, quantise and send one tensor after the other."""

    def __init__(self, trainer: Trainer, recipes: dict[str, str], num_engines: int) -> None:
        self._trainer = trainer
        self._recipes = recipes
        self._num_engines = num_engines

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Released when the last tensor was handed over."""
        sent = 0
        for tensor in encoded(self._trainer, self._recipes, recorder):
            with recorder.span("broadcast", WIRE):
                dist.broadcast(as_bytes(tensor), 0, group=self._trainer.world.receivers)
            sent += tensor.nbytes
        return Outcome(released_s=time.monotonic(), wire_bytes=sent * self._num_engines)

    def tidy(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing is held."""


class PartReceiver:
    """The engines' side of ``broadcast``: one receive buffer, loaded before the next tensor comes."""

    def __init__(self, engine: Engine, parts: list[PartSpec], encode_here: bool) -> None:
        self._engine = engine
        self._parts = parts
        self._encode_here = encode_here
        self._buffer = torch.empty(max(part.nbytes for part in parts), dtype=torch.uint8)

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """The live weights are a mixture from the first tensor to the last: the engine is paused for so long."""
        first_load = _load(self._engine, self._receive(recorder), self._encode_here, recorder)
        return Outcome(pause_s=time.monotonic() - first_load)

    def _receive(self, recorder: Recorder) -> Iterator[tuple[PartSpec, torch.Tensor]]:
        for part in self._parts:
            memory = self._buffer[: part.nbytes]
            with recorder.span("broadcast", WIRE):
                dist.broadcast(memory, 0, group=self._engine.world.receivers)
            yield part, memory

    def tidy(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Forget the receive buffer."""
        self._buffer = torch.empty(0, dtype=torch.uint8)


class Slot(msgspec.Struct, frozen=True):
    """A part and its offset in its bucket, in bytes."""

    part: PartSpec
    offset: int


def pack_plan(parts: list[PartSpec], bucket_bytes: int = BUCKET_BYTES) -> list[list[Slot]]:
    """Fill buckets in order. A part larger than a bucket gets one of its own size."""
    buckets: list[list[Slot]] = []
    offset = bucket_bytes
    for part in parts:
        if not buckets or offset + part.nbytes > bucket_bytes:
            buckets.append([])
            offset = 0
        buckets[-1].append(Slot(part, offset))
        offset += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
    return buckets


def used_bytes(bucket: list[Slot]) -> int:
    """Bytes of a bucket up to the end of its last part."""
    return bucket[-1].offset + bucket[-1].part.nbytes


class _Buffers:
    """Two buffers in turn, each with the broadcast that uses it."""

    def __init__(self, buckets: list[list[Slot]]) -> None:
        size = max(used_bytes(bucket) for bucket in buckets)
        self._memory = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        self._works: list[dist.Work | None] = [None, None]

    def memory(self, bucket_idx: int, bucket: list[Slot]) -> torch.Tensor:
        return self._memory[bucket_idx % 2][: used_bytes(bucket)]

    def start(self, bucket_idx: int, bucket: list[Slot], group: dist.ProcessGroup) -> None:
        memory = self.memory(bucket_idx, bucket)
        self._works[bucket_idx % 2] = dist.broadcast(memory, 0, group=group, async_op=True)

    def wait(self, bucket_idx: int) -> None:
        work = self._works[bucket_idx % 2]
        if work is not None:
            work.wait()
        self._works[bucket_idx % 2] = None


class BucketSender:
    """The trainers' side of ``buckets``: packs one bucket while the other travels."""

    def __init__(self, trainer: Trainer, recipes: dict[str, str], parts: list[PartSpec], num_engines: int) -> None:
        self._trainer = trainer
        self._recipes = recipes
        self._num_engines = num_engines
        self._buckets = pack_plan(parts)
        self._buffers = _Buffers(self._buckets) if trainer.world.side_rank == 0 else None

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Released when the last bucket was handed over."""
        tensors = encoded(self._trainer, self._recipes, recorder)
        buffers = self._buffers
        if buffers is None:
            for _ in tensors:
                pass
            return Outcome(released_s=time.monotonic())
        for idx, bucket in enumerate(self._buckets):
            with recorder.span("broadcast", WIRE):
                buffers.wait(idx)
            self._pack(buffers.memory(idx, bucket), bucket, tensors, recorder)
            buffers.start(idx, bucket, self._trainer.world.receivers)
        with recorder.span("broadcast", WIRE):
            for idx in range(len(self._buckets), len(self._buckets) + 2):
                buffers.wait(idx)
        next(tensors, None)
        sent = sum(used_bytes(bucket) for bucket in self._buckets)
        return Outcome(released_s=time.monotonic(), wire_bytes=sent * self._num_engines)

    def _pack(
        self, memory: torch.Tensor, bucket: list[Slot], tensors: Iterator[torch.Tensor], recorder: Recorder
    ) -> None:
        for slot in bucket:
            tensor = next(tensors)
            with recorder.span("pack", ASSEMBLE):
                memory[slot.offset : slot.offset + slot.part.nbytes].copy_(as_bytes(tensor))

    def tidy(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Forget the buckets."""
        self._buffers = None


class BucketReceiver:
    """The engines' side of ``buckets``: loads one bucket while the next arrives."""

    def __init__(self, engine: Engine, parts: list[PartSpec], encode_here: bool) -> None:
        self._engine = engine
        self._encode_here = encode_here
        self._buckets = pack_plan(parts)
        self._buffers = _Buffers(self._buckets)

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """The live weights are a mixture from the first bucket to the last: the engine is paused for so long."""
        first_load = _load(self._engine, self._receive(recorder), self._encode_here, recorder)
        return Outcome(pause_s=time.monotonic() - first_load)

    def _receive(self, recorder: Recorder) -> Iterator[tuple[PartSpec, torch.Tensor]]:
        self._buffers.start(0, self._buckets[0], self._engine.world.receivers)
        for idx, bucket in enumerate(self._buckets):
            with recorder.span("broadcast", WIRE):
                self._buffers.wait(idx)
            if idx + 1 < len(self._buckets):
                self._buffers.start(idx + 1, self._buckets[idx + 1], self._engine.world.receivers)
            memory = self._buffers.memory(idx, bucket)
            for slot in bucket:
                yield slot.part, memory[slot.offset : slot.offset + slot.part.nbytes]

    def tidy(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Forget the buckets."""
        self._buckets = []
        del self._buffers


def encoded(trainer: Trainer, recipes: dict[str, str], recorder: Recorder) -> Iterator[torch.Tensor]:
    """Gather on all trainers; on trainer 0 yield every part of every tensor, quantised."""
    for name, full in gather(trainer, recorder):
        if trainer.world.side_rank != 0:
            continue
        with recorder.span("quantise", ASSEMBLE):
            parts = encode(name, full, recipes[name])
        for _, tensor in parts:
            yield tensor.contiguous()


def _load(
    engine: Engine, received: Iterator[tuple[PartSpec, torch.Tensor]], encode_here: bool, recorder: Recorder
) -> float:
    """Hand what arrives to one call of the engine's own loader, quantised here if raw values travelled.

    Returns:
        When the first tensor was handed over, on `time.monotonic`.
    """
    first_load = 0.0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal first_load
        for part, memory in received:
            begin = time.monotonic()
            first_load = first_load or begin
            dtype: torch.dtype = getattr(torch, part.dtype)
            tensor = memory.view(dtype).view(part.shape)
            yield from encode(part.name, tensor, engine.recipes[part.name]) if encode_here else [(part.name, tensor)]
            recorder.add("load", INSTALL, begin, time.monotonic())

    engine.load(tensors())
    return first_load
