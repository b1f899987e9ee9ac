"""The case that every planner gets, and what each answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wsync.plan.flows import Route, Routing, Share
from wsync.plan.nodes import Nodes
from wsync.sim.policies.moves import Moves, TreeBook
from wsync.sim.policies.trees import TreeMaker
from wsync.sim.presets.machines import RDMA_ALPHA_S
from wsync.spec.box import Box
from wsync.spec.cluster import Cluster, Nic, NodeGroup
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SinkManifest, SourceManifest, TensorSpec
from wsync.testing.generators import dense_tensors, fsdp_source, tp_sink


@dataclass(frozen=True)
class PeerCase:
    """Tensors sharded evenly over each copy of the trainer and over each replica of the engine, in bf16.

    Attributes:
        source: ranks in order of copy, one box of each tensor on each rank.
        sink: ranks in order of replica, one box of each tensor on each rank.
        cluster: their machines.
        num_copies: of the model on the trainer's side.
        num_replicas: of the engine.
    """

    source: SourceManifest
    sink: SinkManifest
    cluster: Cluster
    num_copies: int
    num_replicas: int

    @property
    def copy_size(self) -> int:
        """Ranks of one copy."""
        return len(self.source.ranks) // self.num_copies

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return len(self.sink.ranks) // self.num_replicas

    @property
    def tensors(self) -> list[tuple[int, TensorSpec]]:
        """With their index; aliases are not moved."""
        return [(i, t) for i, t in enumerate(self.source.tensors) if not t.alias_of]

    def sink_boxes(self) -> list[Mapping[str, Box]]:
        """The box of each tensor on each engine rank."""
        return [{c.tensor: c.box for c in rank.copies} for rank in self.sink.ranks]


@dataclass(frozen=True)
class PeerPlan:
    """What a planner answers.

    Attributes:
        sent: bytes by (trainer rank, sink index), all of them straight from one to the other.
        num_operations: copies that it lists.
    """

    sent: Mapping[tuple[int, int], int]
    num_operations: int

    def moves(self, nodes: Nodes) -> Moves:
        """The same, for the time model that plans and policies share."""
        maker, book = TreeMaker(nodes), TreeBook()
        by_sink: dict[int, list[Share]] = {}
        for (src_rank, sink_idx), nbytes in sorted(self.sent.items()):
            tree_idx = book.add(maker.direct(src_rank, sink_idx))
            by_sink.setdefault(sink_idx, []).append(Share(src_rank, tree_idx, nbytes))
        routes = tuple(Route((sink_idx,), tuple(shares)) for sink_idx, shares in by_sink.items())
        return Moves(Routing(book.trees, [routes]))


def small_case(num_layers: int = 8) -> PeerCase:
    """Two trainer copies of eight ranks each to four replicas of four, eight GPUs a node: a small dense model."""
    tensors = dense_tensors(num_layers, 1024, 16, 8, 64, 2816, 32768)
    trainers = [f"t{i // 8}" for i in range(16)]
    engines = [[f"e{replica // 2}"] * 4 for replica in range(4)]
    hosts = tuple(dict.fromkeys([*trainers, *(h for replica in engines for h in replica)]))
    group = NodeGroup(
        "h100",
        len(hosts),
        400.0,
        hosts=hosts,
        num_gpus=8,
        hbm_gbps=3350.0,
        pcie_gbps=55.0,
        nvlink_gbps=450.0,
        nvlink_domain=8,
        nics=tuple(Nic(50.0, rail) for rail in range(8)),
    )
    cluster = Cluster((group,), alpha_s=RDMA_ALPHA_S)
    return PeerCase(fsdp_source(tensors, trainers, replicas=2), tp_sink(tensors, engines), cluster, 2, 4)


def box_bytes(tensor: TensorSpec, box: Box) -> int:
    """Bytes of a box as the trainer holds it."""
    return box.num_elements * itemsize(tensor.dtype)
