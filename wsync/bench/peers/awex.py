"""awex's planner, ``awex.transfer.transfer_plan.TransferPlanBuilder``.

It takes one engine's parameters and the number of engines; its package imports Megatron and torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from wsync.bench.peers.case import PeerCase, PeerPlan
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import TensorSpec


def plan_awex(case: PeerCase) -> Callable[[], PeerPlan]:
    """Describe the case to it; the result runs its planner."""
    from awex.transfer.transfer_plan import TransferPlanBuilder

    logging.getLogger("awex").setLevel(logging.WARNING)
    num_sinks, num_sources = len(case.sink.ranks), len(case.source.ranks)
    builder = TransferPlanBuilder(num_sinks, num_sources, case.num_replicas)
    boxes = case.sink_boxes()[: case.replica_size]
    inference, training = [], []
    for i, tensor in case.tensors:
        copies = [case.source.shards[i][r][0] for r in range(num_sources)]
        training.append(_parameter(tensor, copies, case.copy_size))
        inference.append(_parameter(tensor, [held[tensor.name] for held in boxes], case.replica_size))

    def run() -> PeerPlan:
        return _answer(builder.build_weights_mapping_operations(inference, training), case)

    return run


def _parameter(tensor: TensorSpec, boxes: list[Box], size: int) -> Any:
    """One parameter, with the replicas that its boxes make: those of one copy, or each that is whole by itself."""
    import torch
    from awex.meta.weight_meta import ParameterMeta, ParameterReplicaMeta, ParameterShardMeta

    dtype = getattr(torch, tensor.dtype)
    whole = boxes[0] == Box.whole(tensor.shape)
    shards = [
        ParameterShardMeta(
            tp_rank=rank % size,
            attn_tp_rank=rank % size,
            pp_rank=0,
            ep_rank=0,
            ep_tp_rank=0,
            global_rank=rank,
            world_size=len(boxes),
            engine_rank=0,
            name=tensor.name,
            shape=box.shape,
            numel=box.num_elements,
            dtype=dtype,
            global_offset=box.offset,
            num_shards=1 if whole else size,
        )
        for rank, box in enumerate(boxes)
    ]
    step = 1 if whole else size
    replicas = [ParameterReplicaMeta(shards[i : i + step]) for i in range(0, len(shards), step)]
    num_elements = Box.whole(tensor.shape).num_elements
    return ParameterMeta(tensor.name, num_elements, tensor.shape, dtype, shards, replicas)


def _answer(operations: list[Any], case: PeerCase) -> PeerPlan:
    sent: dict[tuple[int, int], int] = {}
    sizes = {t.name: itemsize(t.dtype) for _, t in case.tensors}
    num_sinks = len(case.sink.ranks)
    for operation in operations:
        box = Box((0,) * len(operation.overlap_shape), operation.overlap_shape)
        key = (operation.send_rank - num_sinks, operation.recv_rank)
        nbytes = sizes[operation.send_shard_meta.name] * box.num_elements
        sent[key] = sent.get(key, 0) + nbytes
    return PeerPlan(sent, len(operations))
