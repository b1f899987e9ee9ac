"""What ``wsync bench vllm`` asks of the server's worker: how it holds its weights, and the packed broadcast baseline.

vLLM loads `BenchExtension` into its worker (``--worker-extension-cls``) and calls its methods for ``/collective_rpc``.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
import torch.distributed as dist

PEER_HOST = "127.0.0.1"
TRAINER, WORKER = 0, 1
_ALIGNMENT = 64


class PackedTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


class Bucket(msgspec.Struct, frozen=True):
    """Tensors that travel together, in ``num_bytes``."""

    tensors: list[PackedTensor]
    num_bytes: int


def make_buckets(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> list[Bucket]:
    """Put the tensors in order into buckets of at most ``bucket_bytes``; a larger tensor gets one of its own."""
    buckets: list[Bucket] = []
    packed: list[PackedTensor] = []
    end = 0
    for name, tensor in tensors.items():
        if packed and end + tensor.nbytes > bucket_bytes:
            buckets.append(Bucket(packed, end))
            packed, end = [], 0
        packed.append(PackedTensor(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), end))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return [*buckets, Bucket(packed, end)] if packed else buckets


def tensor_in(memory: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """The tensor as it lies in the bytes of its bucket, without a copy."""
    dtype: torch.dtype = getattr(torch, packed.dtype)
    num_bytes = dtype.itemsize * torch.Size(packed.shape).numel()
    return memory[packed.offset : packed.offset + num_bytes].view(dtype).view(packed.shape)


def join_group(port: int, rank: int, deadline_s: float) -> Any:
    """The gloo group of trainer and worker, beside whatever other groups a process has."""
    timeout = datetime.timedelta(seconds=deadline_s)
    gloo: Any = dist.ProcessGroupGloo
    tcp_store: Any = vars(dist)["TCPStore"]  # stubs leave it out
    store = tcp_store(PEER_HOST, port, 2, is_master=rank == TRAINER, timeout=timeout, wait_for_workers=False)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=PEER_HOST)]
    options._timeout = timeout
    return gloo(store, rank, 2, options)


def broadcast(group: Any, memory: torch.Tensor) -> Any:
    """Begin to send (or to receive) a bucket; ``wait()`` on what is returned."""
    options = dist.BroadcastOptions()
    options.rootRank = TRAINER
    options.rootTensor = 0
    return group.broadcast([memory], options)


class BenchExtension:
    """Methods of the worker; ``model_runner``, ``vllm_config`` and ``model_config`` are vLLM's."""

    model_runner: Any
    vllm_config: Any
    model_config: Any

    def wsync_bench_describe(self) -> dict[str, Any]:
        """How the engine holds its linear weights: layers whose weight is in a packed matrix, and those in place."""
        linear = [module for module in self.model_runner.get_model().modules() if hasattr(module, "cpu_linear")]
        packed = sum(module.weight.numel() == 0 for module in linear)
        return {"linear_layers": len(linear), "packed_layers": packed}

    def wsync_bench_join(self, port: int, buckets: str, deadline_s: float) -> None:
        """Join the trainer's group, and allocate what is received into, once."""
        self._wsync_bench_buckets = msgspec.json.decode(buckets, type=list[Bucket])
        self._wsync_bench_memory = [
            torch.zeros(bucket.num_bytes, dtype=torch.uint8) for bucket in self._wsync_bench_buckets
        ]
        self._wsync_bench_group = join_group(port, WORKER, deadline_s)

    def wsync_bench_receive(self) -> None:
        """Receive all buckets, and load each with vLLM's layerwise reload while the next ones arrive."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        arriving = [broadcast(self._wsync_bench_group, memory) for memory in self._wsync_bench_memory]
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(self._wsync_bench_tensors(arriving))
            finalize_layerwise_reload(model, self.model_config)  # type: ignore[no-untyped-call, unused-ignore]

    def _wsync_bench_tensors(self, arriving: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket, memory, work in zip(self._wsync_bench_buckets, self._wsync_bench_memory, arriving, strict=True):
            work.wait()
            for packed in bucket.tensors:
                yield packed.name, tensor_in(memory, packed)

    def wsync_bench_corrupt(self) -> None:
        """Flip one bit of the last element of the last weight that is not empty."""
        weights = [p for p in self.model_runner.get_model().parameters() if p.numel()]
        weights[-1].data.view(-1)[-1:].view(torch.uint8)[0] ^= 1
