"""What it costs to keep weights, or what engine ranks receive, in host memory beside a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from wsync.plan.nodes import Nodes
from wsync.plan.places import Place
from wsync.plan.plans import Plan

_WORTH = 0.03
"""Share of the time from which a difference is worth more than a clause."""


def host_advice(plan: Plan, nodes: Nodes, device_bound_s: float, device_s: float) -> Iterator[str]:
    """Sentences for a job some of whose ranks keep something in host memory; none for others.

    Args:
        plan: of the job.
        nodes: of the job.
        device_bound_s, device_s: the bound, and the time of this plan, if nothing were kept in host memory.
    """
    kept = []
    if count := sum(lane.offloaded for lane in nodes.sources):
        kept.append(f"the weights of {count} trainer ranks")
    if count := sum(lane.in_host for lane in nodes.sinks):
        kept.append(f"what {count} engine ranks receive")
    if not kept:
        return
    what = " and ".join(kept)
    if device_s < plan.time_s * (1 - _WORTH):
        yield (
            f"{what}: kept on the GPUs instead of in host memory, about {device_s:.3g} s in place of {plan.time_s:.3g} "
            f"s (bound {device_bound_s:.3g} s in place of {plan.lower_bound_s:.3g} s)"
        )
    else:
        yield f"{what} may stay in host memory: {device_s:.3g} s on the GPUs in place of {plan.time_s:.3g} s"
    if pause_s := install_s(plan, nodes):
        yield (
            f"engine ranks in mode staged bring a version from host memory to their GPUs when they commit it: up to "
            f"{pause_s:.3g} s in which they do not serve, after the wire instead of beside it"
        )


def install_s(plan: Plan, nodes: Nodes) -> float:
    """Seconds that the slowest engine rank needs to bring a whole version from host memory to its GPU."""
    of_tree: Counter[int] = Counter()
    for flow in plan.flows:
        of_tree[flow.tree_idx] += flow.wire_bytes
    by_gpu: Counter[Place] = Counter()
    by_node: Counter[int] = Counter()
    for tree_idx, nbytes in of_tree.items():
        for lane in (nodes.sinks[s] for s in plan.trees[tree_idx].sinks):
            if lane.in_host:
                by_gpu[Place(lane.node, lane.gpu)] += nbytes
                by_node[lane.node] += nbytes
    groups = nodes.groups
    seconds = [n / ((groups[p.node].pcie_gbps or groups[p.node].host_gbps) * 1e9) for p, n in by_gpu.items()]
    seconds += [n / (2 * groups[node].host_gbps * 1e9) for node, n in by_node.items()]
    return max(seconds, default=0.0)
