"""Which trees and NICs the bytes of a run take: straight ways where nothing is late by them, else those done first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.route.assign import Run
from wsync.plan.route.plots import Edges, Plot, Plots
from wsync.plan.route.relays import Fans
from wsync.plan.route.steep import steep
from wsync.plan.route.survey import Bundle, Family
from wsync.plan.route.trees import TreeBook

COARSE = 1000
"""A piece of more than one part in so many of what a NIC carries is striped over several."""
MAX_PIECES = 6000
"""About as many pieces are chosen for, unless there are more runs."""
LATE = 1.0003
"""A NIC is late if it carries more than this many times what the busiest one has to."""
MAX_SWEEPS = 12
"""Pieces are placed again at most so many times, fewer where there are many."""
MAX_PLACED = 4 * MAX_PIECES
"""About as many pieces are placed again in all."""


class _Ways(NamedTuple):
    """What each way of a tree loads: parts of the cluster, and which part of the busiest time a byte takes there."""

    parts: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]


@dataclass(eq=False, slots=True)
class _Piece:
    """Bytes of one plot of a run that take one way."""

    run_idx: int
    plot_idx: int
    ways: _Ways
    nbytes: int
    way: int = 0


class Stripes:
    """Chooses ways.

    Args:
        nodes: of the job.
        bundles: that runs belong to.
        fans: of the bundles.
        book: of the trees.
        bucket_bytes: stripes are whole buckets.
    """

    def __init__(self, nodes: Nodes, bundles: Sequence[Bundle], fans: Fans, book: TreeBook, bucket_bytes: int) -> None:
        self.nodes = nodes
        self.bundles = bundles
        self.book = book
        self.bucket_bytes = bucket_bytes
        self.plots = Plots(bundles, fans, nodes, bucket_bytes)
        unit = max(1, fans.worst)
        self.cost = [byte_cost(n.rate_gbps) / unit for n in nodes.nics]
        self.local_cost = [nodes.local_cost[n] / unit for n in nodes.sink_node]
        self.level = np.zeros(2 * len(nodes.nics) + len(nodes.sinks))
        self.cost_of = np.array(self.cost)
        self._ways: dict[tuple[int, int, Edges], _Ways] = {}
        self._shapes: dict[tuple[int, int, Edges], _Ways] = {}

    def choose(self, runs: Sequence[Run]) -> list[list[tuple[int, int]]]:
        """For each run its (tree, bytes), in order of the NICs that they leave by."""
        order = sorted(range(len(runs)), key=lambda i: (-runs[i].nbytes, i))
        plots: list[list[Plot]] = [[] for _ in runs]
        for i in order:
            plots[i] = self.plots.cut(runs[i])
        late = self._straight(runs, plots)
        out: list[list[tuple[int, int]]] = [[] for _ in runs]
        for i in order:
            if i not in late:
                family = self.bundles[runs[i].bundle_idx].family
                count = len(self.nodes.ports[runs[i].port].nics)
                out[i] = [(self.book.remote(family, plot.edges, 0, count), plot.nbytes) for plot in plots[i]]
        pieces = self._cut([(i, runs[i], plots[i]) for i in order if i in late])
        for piece in pieces:
            self._place(piece)
        self._settle(pieces)
        for i, found in groupby(pieces, key=lambda p: p.run_idx):
            out[i] = self._trees(runs[i], plots[i], list(found))
        return out

    def _cut(self, runs: Sequence[tuple[int, Run, Sequence[Plot]]]) -> list[_Piece]:
        scale = MAX_PIECES / max(1, sum(run.nbytes for _, run, _ in runs))
        pieces = []
        for i, run, plots in runs:
            limit = int(run.nbytes * scale / max(1, len(plots))) + 1
            for at, plot in enumerate(plots):
                ways = self.ways(run, plot)
                for nbytes in self._pieces(plot.nbytes, max(2 * len(ways.parts), limit), ways):
                    pieces.append(_Piece(i, at, ways, nbytes))
        return pieces

    def _place(self, piece: _Piece) -> None:
        """Put a piece where the levels after it are lowest."""
        ways, way = piece.ways, 0
        if len(ways.parts) > 1:
            after = self.level[ways.parts] + ways.costs * piece.nbytes
            # One after the other: the order of a vectorised sum, and so its last bit, is the library's choice.
            way = int(np.argmin(np.cumsum(ways.costs * steep(after), axis=1)[:, -1]))
        piece.way = way
        self._add(ways, way, piece.nbytes)

    def _settle(self, pieces: Sequence[_Piece]) -> None:
        """Place pieces again, now that all others are there, for as long as something is late and that helps."""
        top = float(self.level.max(initial=0.0))
        for _ in range(min(MAX_SWEEPS, MAX_PLACED // max(1, len(pieces)))):
            if top <= LATE:
                return
            for piece in pieces:
                self._add(piece.ways, piece.way, -piece.nbytes)
                self._place(piece)
            before, top = top, float(self.level.max(initial=0.0))
            if top > before * 0.9999:
                return

    def _straight(self, runs: Sequence[Run], plots: Sequence[Sequence[Plot]]) -> set[int]:
        """Load straight ways; returns the runs that have none, or not one that is early enough."""
        late = set()
        for i, run in enumerate(runs):
            if self.book.doors(self.bundles[run.bundle_idx].family).single:
                self._add_all(run, plots[i], 1)
            else:
                late.add(i)
        busy = set(np.nonzero(self.level > LATE)[0].tolist())
        for i, run in enumerate(runs):
            if (
                busy
                and i not in late
                and any(not busy.isdisjoint(self.ways(run, plot).parts[0].tolist()) for plot in plots[i])
            ):
                self._add_all(run, plots[i], -1)
                late.add(i)
        return late

    def _add_all(self, run: Run, plots: Sequence[Plot], sign: int) -> None:
        for plot in plots:
            self._add(self.ways(run, plot), 0, sign * plot.nbytes)

    def ways(self, run: Run, plot: Plot) -> _Ways:
        """What each way of a run's tree loads."""
        family = self.bundles[run.bundle_idx].family
        key = (family.number, run.port, plot.edges)
        found = self._ways.get(key)
        if found is None:
            found = self._ways[key] = self._find_ways(family, run.port, plot.edges)
        return found

    def _find_ways(self, family: Family, port: int, edges: Edges) -> _Ways:
        reach = np.array(self.nodes.ports[port].nics, dtype=np.int64)
        key = (family.number, len(reach), edges)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = self._find_shape(family, len(reach), edges)
        parts, costs = shape
        size = len(self.level)
        leaves = parts >= size
        outs = reach[np.where(leaves, parts - size, 0)]
        return _Ways(
            np.where(leaves, outs + len(self.cost), parts), np.where(leaves, costs * self.cost_of[outs], costs)
        )

    def _find_shape(self, family: Family, num_nics: int, edges: Edges) -> _Ways:
        """Ways for every sender of so many NICs: its k-th NIC is number k behind all parts, with how often it sends."""
        doors, nodes, count, size = self.book.doors(family), self.nodes, len(self.cost), len(self.level)
        parts: list[list[int]] = []
        costs: list[list[float]] = []
        for way in range(doors.num_ways(num_nics)):
            loads: dict[int, float] = {}
            found = [doors.at(at, way, num_nics) for at in range(len(family.members))]
            for before, at in edges:
                door = found[at]
                out, cost = size + door.rail % num_nics, 1.0
                if before >= 0:
                    nic = nodes.sink_nic(found[before].head, door.rail)
                    out, cost = count + nic, self.cost[nic]
                loads[door.nic] = loads.get(door.nic, 0.0) + self.cost[door.nic]
                loads[out] = loads.get(out, 0.0) + cost
                others = len(family.members[at]) - 1
                if others:
                    loads[2 * count + door.head] = others * self.local_cost[door.head]
            parts.append(list(loads))
            costs.append(list(loads.values()))
        width = max(len(p) for p in parts)
        return _Ways(
            np.array([p + [0] * (width - len(p)) for p in parts], dtype=np.int64),
            np.array([c + [0.0] * (width - len(c)) for c in costs]),
        )

    def _add(self, ways: _Ways, way: int, nbytes: int) -> None:
        np.add.at(self.level, ways.parts[way], ways.costs[way] * nbytes)

    def _trees(self, run: Run, plots: Sequence[Plot], pieces: Sequence[_Piece]) -> list[tuple[int, int]]:
        family = self.bundles[run.bundle_idx].family
        total: dict[tuple[int, int], int] = {}
        for piece in pieces:
            key = (piece.plot_idx, piece.way)
            total[key] = total.get(key, 0) + piece.nbytes
        found = sorted((self._leaves_by(run, family, plots[at], way), at, way) for at, way in total)
        count = len(self.nodes.ports[run.port].nics)
        return [(self.book.remote(family, plots[at].edges, way, count), total[(at, way)]) for _, at, way in found]

    def _leaves_by(self, run: Run, family: Family, plot: Plot, way: int) -> int:
        """The NIC of the sender's first hop."""
        reach = self.nodes.ports[run.port].nics
        first = next(at for before, at in plot.edges if before < 0)
        return reach[self.book.doors(family).at(first, way, len(reach)).rail % len(reach)]

    def _pieces(self, nbytes: int, limit: int, ways: _Ways) -> Iterator[int]:
        """Cut into parts of whole buckets if it is coarse, else not at all."""
        unit = self.bucket_bytes
        wanted = min(limit, int(nbytes * float(ways.costs.max()) * COARSE) + 1, nbytes // unit)
        if len(ways.parts) == 1 or wanted < 2:
            yield nbytes
            return
        buckets = -(-nbytes // unit)
        for a, b in pairwise([*(i * buckets // wanted * unit for i in range(wanted)), nbytes]):
            yield b - a
