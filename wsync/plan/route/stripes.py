"""Which NICs the bytes of a run take: its straight way where nothing is late by it, else those that are done first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.route.assign import Run
from wsync.plan.route.relays import GRAIN, Fan, Fans
from wsync.plan.route.survey import Bundle, Family
from wsync.plan.route.trees import TreeBook

COARSE = 100
"""A run of more than one part in so many of what a NIC carries is striped over several."""
LATE = 1.002
"""A NIC is late if it carries more than this many times what the busiest one has to."""
STEEPNESS = 7
"""Loads are summed up to the power of one more than this, so that the highest counts most."""


class _Ways(NamedTuple):
    """What each way of a run loads: parts of the cluster, and how much of the busiest one's time a byte takes there."""

    parts: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]


class Stripes:
    """Chooses ways.

    Args:
        nodes: of the job.
        bundles: that runs belong to.
        fans: of the bundles.
        book: of the trees, for the doors.
        bucket_bytes: stripes are whole buckets.
    """

    def __init__(self, nodes: Nodes, bundles: Sequence[Bundle], fans: Fans, book: TreeBook, bucket_bytes: int) -> None:
        self.nodes = nodes
        self.bundles = bundles
        self.fans = fans
        self.book = book
        self.bucket_bytes = bucket_bytes
        unit = max(1, fans.worst)
        self.cost = [byte_cost(n.rate_gbps) / unit for n in nodes.nics]
        self.local_cost = [nodes.local_cost[n] / unit for n in nodes.sink_node]
        self.level = np.zeros(2 * len(nodes.nics) + len(nodes.sinks))
        self._ways: dict[tuple[int, Fan, int], _Ways] = {}

    def choose(self, runs: Sequence[Run]) -> list[list[tuple[int, int]]]:
        """For each run its stripes as (way, bytes), in order of the NICs that they leave by."""
        out: list[list[tuple[int, int]]] = [[] for _ in runs]
        open_idx: list[int] = []
        straight: list[int] = []
        for i, run in enumerate(runs):
            single = self.book.doors(self.bundles[run.bundle_idx].family).single
            (straight if single else open_idx).append(i)
            if single:
                self._add(self.ways(run), 0, run.nbytes)
        late = set(np.nonzero(self.level > LATE)[0].tolist())
        for i in straight:
            ways = self.ways(runs[i])
            if late and not late.isdisjoint(ways.parts[0].tolist()):
                self._add(ways, 0, -runs[i].nbytes)
                open_idx.append(i)
            else:
                out[i] = [(0, runs[i].nbytes)]
        for i in sorted(open_idx, key=lambda i: (-runs[i].nbytes, i)):
            out[i] = self._stripe(runs[i])
        return out

    def ways(self, run: Run) -> _Ways:
        """What each way of a run loads."""
        family, fan = self.bundles[run.bundle_idx].family, self.fans.of[run.bundle_idx]
        key = (family.number, fan, run.port)
        found = self._ways.get(key)
        if found is None:
            found = self._ways[key] = self._find_ways(family, fan, run.port)
        return found

    def _find_ways(self, family: Family, fan: Fan, port: int) -> _Ways:
        doors, nodes, count = self.book.doors(family), self.nodes, len(self.cost)
        reach = nodes.ports[port].nics
        sent = fan.source / GRAIN / len(family.islands)
        parts: list[list[int]] = []
        costs: list[list[float]] = []
        for way in range(max(doors.count, len(reach))):
            loads: dict[int, float] = {}
            for at, members in enumerate(family.members):
                door = doors.at(at, way)
                out = reach[door.rail % len(reach)]
                loads[door.nic] = loads.get(door.nic, 0.0) + self.cost[door.nic]
                loads[count + out] = loads.get(count + out, 0.0) + sent * self.cost[out]
                if fan.relays and fan.relays[at]:
                    on = nodes.sink_nic(door.head, door.rail)
                    loads[count + on] = loads.get(count + on, 0.0) + fan.relays[at] / GRAIN * self.cost[on]
                if len(members) > 1:
                    head = 2 * count + door.head
                    loads[head] = loads.get(head, 0.0) + (len(members) - 1) * self.local_cost[door.head]
            parts.append(list(loads))
            costs.append(list(loads.values()))
        width = max(len(p) for p in parts)
        return _Ways(
            np.array([p + [0] * (width - len(p)) for p in parts], dtype=np.int64),
            np.array([c + [0.0] * (width - len(c)) for c in costs]),
        )

    def _add(self, ways: _Ways, way: int, nbytes: int) -> None:
        # Parts of one way differ, but for the padding, which costs nothing.
        np.add.at(self.level, ways.parts[way], ways.costs[way] * nbytes)

    def _stripe(self, run: Run) -> list[tuple[int, int]]:
        ways = self.ways(run)
        count = len(ways.parts)
        total: dict[int, int] = {}
        for nbytes in self._pieces(run.nbytes, count, float(ways.costs.max())):
            way = 0
            if count > 1:
                after = self.level[ways.parts] + ways.costs * nbytes
                way = int(np.argmin((ways.costs * after**STEEPNESS).sum(axis=1)))
            self._add(ways, way, nbytes)
            total[way] = total.get(way, 0) + nbytes
        reach = self.nodes.ports[run.port].nics
        rail = self.book.doors(self.bundles[run.bundle_idx].family).at
        return sorted(total.items(), key=lambda x: (rail(0, x[0]).rail % len(reach), x[0]))

    def _pieces(self, nbytes: int, count: int, cost: float) -> list[int]:
        """Cut into parts of whole buckets if it is coarse, else not at all."""
        unit = self.bucket_bytes
        wanted = min(2 * count, int(nbytes * cost * COARSE) + 1, nbytes // unit)
        if count == 1 or wanted < 2:
            return [nbytes]
        buckets = -(-nbytes // unit)
        ends = [min(nbytes, (i + 1) * buckets // wanted * unit) for i in range(wanted)]
        return [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]
