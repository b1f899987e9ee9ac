"""Mooncake's planner of weight resharding, ``mooncake.reshard.weight``.

It takes complete placements with parallel coordinates: ranks of a copy are its ``tp`` ranks, copies its ``dp`` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wsync.bench.peers.case import PeerCase, PeerPlan, box_bytes
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import TensorSpec


def plan_mooncake(case: PeerCase) -> Callable[[], PeerPlan]:
    """Describe the case to it; the result runs its planner."""
    from mooncake.reshard.weight import plan_placement_transfer

    tensors = [t for _, t in case.tensors]
    held = [{t.name: case.source.shards[i][r][0] for i, t in case.tensors} for r in range(len(case.source.ranks))]
    source = _placement(tensors, held, case.copy_size)
    target = _placement(tensors, case.sink_boxes(), case.replica_size)

    def run() -> PeerPlan:
        return _answer(plan_placement_transfer(source, target), case)

    return run


def _placement(tensors: Sequence[TensorSpec], boxes: Sequence[Mapping[str, Box]], size: int) -> Any:
    from mooncake.reshard.weight import (
        ParallelRank,
        ParallelTopology,
        PlacementFragment,
        TopologyParticipant,
        WeightPlacementManifest,
    )

    ranks = [ParallelRank(dp=i // size, tp=i % size) for i in range(len(boxes))]
    topology = ParallelTopology(
        tp_size=size,
        pp_size=1,
        ep_size=1,
        dp_size=len(boxes) // size,
        participants=tuple(TopologyParticipant(f"p{i}", rank) for i, rank in enumerate(ranks)),
    )
    fragments = []
    for rank, held in zip(ranks, boxes, strict=True):
        for t in tensors:
            box = held[t.name]
            fragments.append(PlacementFragment(t.name, box.offset, box.shape, box_bytes(t, box), rank))
    return WeightPlacementManifest.from_fragments(
        resource_id="model",
        revision="1",
        weight_generation=1,
        placement_set_id="all",
        topology=topology,
        tensors=[_descriptor(t, boxes[:size]) for t in tensors],
        fragments=fragments,
    )


def _descriptor(tensor: TensorSpec, boxes: Sequence[Mapping[str, Box]]) -> Any:
    """Split over ``tp`` along the dimension in which the ranks' boxes differ, or replicated."""
    from mooncake.reshard.weight import ReplicatedAxis, SplitAxis, TensorDescriptor

    first, last = boxes[0][tensor.name], boxes[-1][tensor.name]
    dims = [d for d in range(len(tensor.shape)) if first.offset[d] != last.offset[d]]
    axes = [SplitAxis("tp", d) for d in dims] or [ReplicatedAxis("tp")]
    return TensorDescriptor(
        tensor_id=tensor.name,
        global_shape=tensor.shape,
        dtype=tensor.dtype,
        itemsize=itemsize(tensor.dtype),
        shard_dims=tuple(dims),
        layout_fingerprint="rows",
        parallel_axes=(*axes, ReplicatedAxis("dp")),
    )


def _answer(plan: Any, case: PeerCase) -> PeerPlan:
    sent: dict[tuple[int, int], int] = {}
    sizes = {t.name: itemsize(t.dtype) for _, t in case.tensors}
    for operation in plan.operations:
        src, dst = operation.source.rank, operation.target.rank
        key = (src.dp * case.copy_size + src.tp, dst.dp * case.replica_size + dst.tp)
        nbytes = sizes[operation.tensor_id] * Box(operation.overlap_offset, operation.overlap_shape).num_elements
        sent[key] = sent.get(key, 0) + nbytes
    return PeerPlan(sent, len(plan.operations))
