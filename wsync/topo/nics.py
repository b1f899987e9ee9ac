"""Which NICs are for computing, and which NIC each GPU should use."""

from __future__ import annotations

from collections import Counter

from wsync.topo.model import KIND_RANK, Nic
from wsync.topo.view import View

_FAR = 8
"""Rank of a NIC to which no path is known."""


def compute_nics(view: View, coherent: bool = False) -> tuple[Nic, ...]:
    """The NICs that a job should use: those on a GPU's own PCIe switch, without ports that are down or much slower.

    Where no GPU has a NIC on its switch (virtual machines), all NICs at the shortest distance that occurs; on Grace,
    where distances mean nothing, and where no distance is known, all. Ports below half the fastest rate of them,
    ports that are down and those of another network (`foreign_nics`) are dropped. Without any RDMA, distances do not
    count.
    """
    ranks = {nic.label: _best_rank(view, nic) for nic in view.nics}
    local = [n for n in view.nics if ranks[n.label] <= KIND_RANK["PXB"]]
    if view.sockets_only:
        local = list(view.nics)
    if not local:
        known = [r for r in ranks.values() if r < _FAR]
        nearest = min(known, default=_FAR)
        local = [n for n in view.nics if coherent or ranks[n.label] <= nearest]
    foreign = foreign_nics(view)
    up = [n for n in local if n.state in (None, "ACTIVE") and n not in foreign]
    fastest = max((n.rate_gbit for n in up if n.rate_gbit is not None), default=0.0)
    return tuple(n for n in up if n.rate_gbit is None or 2 * n.rate_gbit >= fastest)


def foreign_nics(view: View) -> tuple[Nic, ...]:
    """Ports near a GPU whose link layer is not that of most such ports: Ethernet for storage among InfiniBand."""
    near = [n for n in view.nics if n.link_layer and _best_rank(view, n) <= KIND_RANK["PXB"]]
    layers = Counter(n.link_layer for n in near)
    usual = next((layer for layer, count in layers.items() if 2 * count > len(near)), None)
    return tuple(n for n in near if usual is not None and n.link_layer != usual)


def _best_rank(view: View, nic: Nic) -> int:
    kinds = (paths[nic.label] for paths in view.nic_paths.values() if nic.label in paths)
    return min((KIND_RANK[k] for k in kinds), default=_FAR)


def assign_nics(view: View, coherent: bool = False) -> dict[int, str]:
    """One NIC for each GPU such that the sum of distances is smallest; NICs are shared only where there are too few.

    Among equal choices the order of NICs follows that of GPUs. GPUs to which no path is known get none.
    """
    nics = compute_nics(view, coherent)
    gpus = [g for g in view.gpus if any(n.label in view.nic_paths[g.index] for n in nics)]
    if not nics or not gpus:
        return {}
    copies = -(-len(gpus) // len(nics))
    slots = [n for n in nics for _ in range(copies)]
    cost = [
        [
            # A share of a NIC costs more than a step of distance within the node, less than the way across sockets.
            1000 * KIND_RANK.get(view.nic_paths[g.index].get(n.label, ""), _FAR)
            + 300 * (j % copies)
            + abs(i * len(slots) // len(gpus) - j)
            for j, n in enumerate(slots)
        ]
        for i, g in enumerate(gpus)
    ]
    return {gpus[i].index: slots[j].label for i, j in enumerate(hungarian(cost))}


def hungarian(cost: list[list[int]]) -> list[int]:
    """For each row the column of the assignment with the smallest sum; needs at least as many columns as rows.

    Source: Kuhn 1955, Munkres 1957; the shortest augmenting path form with potentials, O(rows^2 columns).
    """
    num_rows, num_columns = len(cost), len(cost[0])
    row_potential, column_potential = [0] * (num_rows + 1), [0] * (num_columns + 1)
    owner = [0] * (num_columns + 1)
    for row in range(1, num_rows + 1):
        owner[0] = row
        column = 0
        slack: list[float] = [float("inf")] * (num_columns + 1)
        came_from, visited = [0] * (num_columns + 1), [False] * (num_columns + 1)
        while owner[column]:
            visited[column] = True
            at, step, following = owner[column], float("inf"), 0
            for j in range(1, num_columns + 1):
                if visited[j]:
                    continue
                reduced = cost[at - 1][j - 1] - row_potential[at] - column_potential[j]
                if reduced < slack[j]:
                    slack[j], came_from[j] = reduced, column
                if slack[j] < step:
                    step, following = slack[j], j
            for j in range(num_columns + 1):
                if visited[j]:
                    row_potential[owner[j]] += int(step)
                    column_potential[j] -= int(step)
                else:
                    slack[j] -= step
            column = following
        while column:
            owner[column] = owner[came_from[column]]
            column = came_from[column]
    found = [0] * num_rows
    for j in range(1, num_columns + 1):
        if owner[j]:
            found[owner[j] - 1] = j - 1
    return found
