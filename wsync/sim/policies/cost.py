"""What a policy's moves cost: the time model of plans, and what arrives against what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsync.plan.flows import LOCAL, DemandGroup, Flow, Tree
from wsync.plan.nodes import Nodes, nodes_of
from wsync.plan.plans import Plan
from wsync.plan.timing import plan_times
from wsync.plan.types import SOURCE
from wsync.sim.policies.moves import Moves, needed_bytes, shares_of


@dataclass(frozen=True, slots=True)
class Cost:
    """What moves cost.

    Attributes:
        time_s: predicted, all phases perfectly overlapped.
        busiest: the part of the cluster that takes longest.
        delivered_ratio: bytes that arrive at engine ranks over bytes that these need.
        entering_ratio: bytes that enter islands of engines over bytes that these need and do not hold.
    """

    time_s: float
    busiest: str
    delivered_ratio: float
    entering_ratio: float


def cost_of(
    moves: Moves, groups: Sequence[DemandGroup], nodes: Nodes, bucket_bytes: int, amax_elements: int = 0
) -> Cost:
    """Predict the seconds of ``moves`` as `plan_times` does those of a plan, and compare bytes with need.

    Args:
        moves: of a policy.
        groups: what is needed.
        nodes: of the job.
        bucket_bytes: size of a message.
        amax_elements: that trainer ranks exchange before they quantise shards; who gathers whole tensors need not.
    """
    trees, flows, everyone = with_gathers(moves, nodes)
    times = plan_times(trees, flows, everyone, bucket_bytes, amax_elements=0 if moves.gathers else amax_elements)
    found = [(times.time_s, times.loads[0].name if times.loads else "")]
    for sink_idx, nbytes in moves.host_bytes.items():
        rate = nodes.groups[nodes.sink_node[sink_idx]].pcie_gbps
        if rate is not None:
            found.append((nbytes / (rate * 1e9), f"PCIe of sink {sink_idx} from its host"))
    time_s, busiest = max(found)
    return Cost(
        time_s,
        busiest,
        _ratio(moves.delivered_bytes, needed_bytes(groups)),
        _ratio(entering_bytes(trees, flows, nodes), least_entering_bytes(groups, nodes)),
    )


def cost_of_plan(plan: Plan, groups: Sequence[DemandGroup], nodes: Nodes) -> Cost:
    """The same of a plan, from the time that it states."""
    times = plan_times(plan.trees, plan.flows, nodes, plan.bucket_bytes, flow_buckets=plan.flow_buckets)
    return Cost(
        plan.time_s,
        times.loads[0].name if times.loads else "",
        _ratio(plan.delivered_bytes, plan.needed_bytes),
        _ratio(entering_bytes(plan.trees, plan.flows, nodes, plan.flow_bytes), least_entering_bytes(groups, nodes)),
    )


def with_gathers(moves: Moves, nodes: Nodes) -> tuple[list[Tree], list[Flow], Nodes]:
    """Trees and flows of everything that moves, and nodes in which the trainer ranks can receive as well.

    Trainer rank r is sink ``num_sinks + r`` there, on its own node.
    """
    sent: dict[tuple[int, int], int] = {}
    for share in shares_of(moves.routing):
        key = (share.src_rank, share.tree_idx)
        sent[key] = sent.get(key, 0) + share.nbytes
    trees = list(moves.routing.trees)
    flows = [Flow(0, src, 0, tree_idx, (), nbytes) for (src, tree_idx), nbytes in sent.items()]
    if not moves.gathers:
        return trees, flows, nodes
    names = nodes.names
    source_hosts = [names[n] for n in nodes.source_node]
    everyone = nodes_of(source_hosts, [*(names[n] for n in nodes.sink_node), *source_hosts], nodes.cluster)
    num_sinks = len(nodes.sink_node)
    for gather in moves.gathers:
        dst = num_sinks + gather.dst_rank
        same = nodes.island[nodes.source_node[gather.src_rank]] == nodes.island[nodes.source_node[gather.dst_rank]]
        lane = everyone.sinks[dst]
        rail = LOCAL if same else lane.reach.index(lane.own[0]) if lane.own else 0
        flows.append(Flow(0, gather.src_rank, 0, len(trees), (), gather.nbytes))
        trees.append(Tree((dst,), ((SOURCE, dst),), (rail,)))
    return trees, flows, everyone


def entering_bytes(
    trees: Sequence[Tree], flows: Sequence[Flow], nodes: Nodes, flow_bytes: Sequence[int] | None = None
) -> int:
    """Bytes that hops bring to engine ranks from other islands; ``flow_bytes`` are those of flows without padding."""
    num_sinks = len(nodes.sink_node)
    total = 0
    for flow, nbytes in zip(flows, flow_bytes or [f.nbytes for f in flows], strict=True):
        for src, dst in trees[flow.tree_idx].hops:
            if dst < num_sinks:
                at = nodes.source_node[flow.src_rank] if src == SOURCE else nodes.sink_node[src]
                total += nbytes * (nodes.island[at] != nodes.island[nodes.sink_node[dst]])
    return total


def least_entering_bytes(groups: Sequence[DemandGroup], nodes: Nodes) -> int:
    """Bytes that islands of engines need and do not hold, once for each island."""
    total = 0
    for group in groups:
        held = {nodes.island[nodes.source_node[r]] for r in group.holders}
        needed = {nodes.island[nodes.sink_node[s]] for s in group.sinks}
        total += group.nbytes * len(needed - held)
    return total


def _ratio(nbytes: int, least: int) -> float:
    return nbytes / least if least else 1.0
