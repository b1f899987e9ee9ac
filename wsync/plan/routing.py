"""Routing: who sends each unit, and along which tree a bucket reaches all who need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from wsync.plan.blocks import Holder, Route, TensorClass, Unit
from wsync.plan.demand import Demand
from wsync.plan.nodes import Nodes
from wsync.plan.types import SOURCE

GroupKey = tuple[int, int, tuple[int, ...]]
"""Sender, stage and needers: what one bucket has one of."""

Choice = dict[tuple[int, int, int], Holder]
"""(demand, unit, route) -> sender, for the routes that have several candidates."""


@dataclass(slots=True)
class Loads:
    """Attoseconds that each trainer rank and each node sends for so far."""

    nodes: Nodes
    by_rank: list[int] = field(default_factory=list)
    by_node: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_rank = [0] * len(self.nodes.source_node)
        self.by_node = [0] * len(self.nodes.names)

    def after(self, rank: int, nbytes: int, sinks: tuple[int, ...]) -> tuple[int, int]:
        """The loads of the rank and of its node once it also sends ``nbytes`` to ``sinks``."""
        node = self.nodes.source_node[rank]
        targets = {self.nodes.sink_node[s] for s in sinks}
        crossings = len(targets) - (node in targets)
        rank_load = self.by_rank[rank] + nbytes * len(targets) * self.nodes.local_cost[node]
        return rank_load, self.by_node[node] + nbytes * crossings * self.nodes.network_cost[node]

    def add(self, rank: int, nbytes: int, sinks: tuple[int, ...]) -> None:
        """Count ``nbytes`` sent by ``rank`` to ``sinks``."""
        self.by_rank[rank], self.by_node[self.nodes.source_node[rank]] = self.after(rank, nbytes, sinks)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A unit of one tensor in one sender's queue."""

    demand_idx: int
    shard_idx: int
    unit: Unit


def choose_senders(classes: list[TensorClass], order: dict[int, int], nodes: Nodes) -> Choice:
    """Longest processing time first: the heaviest open route goes to the candidate that is done earliest.

    What only one rank holds is counted before the first choice.

    Args:
        classes: of all tensors.
        order: id of a demand -> its index.
        nodes: for the rates.
    """
    loads = Loads(nodes)
    flexible: list[tuple[int, int, int, int, Route]] = []
    for cls in classes:
        for unit_idx, unit in enumerate(cls.units):
            if unit.follows >= 0:
                continue
            for route_idx, route in enumerate(unit.routes):
                if len(route.candidates) == 1:
                    loads.add(route.candidates[0][0], unit.nbytes * len(cls.members), route.sinks)
                    continue
                for member in cls.members:
                    flexible.append((-unit.nbytes, order[id(member)], unit_idx, route_idx, route))
    flexible.sort(key=lambda f: f[:4])
    choice: Choice = {}
    for negative, demand_idx, unit_idx, route_idx, route in flexible:
        sender = _least_loaded(loads, route, -negative)
        loads.add(sender[0], -negative, route.sinks)
        choice[(demand_idx, unit_idx, route_idx)] = sender
    return choice


def _least_loaded(loads: Loads, route: Route, nbytes: int) -> Holder:
    def finish(holder: Holder) -> tuple[int, int, int]:
        rank_load, node_load = loads.after(holder[0], nbytes, route.sinks)
        return max(rank_load, node_load), rank_load, holder[0]

    return min(route.candidates, key=finish)


def queue_units(
    demands: list[Demand], class_of: list[TensorClass], choice: Choice, nodes: Nodes
) -> dict[GroupKey, list[Entry]]:
    """Every sender's queue for each set of needers, in order of tensor."""
    groups: dict[GroupKey, list[Entry]] = {}
    for demand_idx in range(len(demands)):
        units = class_of[demand_idx].units
        for unit_idx, unit in enumerate(units):
            for (rank, shard_idx), sinks in _served(units, unit_idx, demand_idx, choice, nodes):
                groups.setdefault((rank, unit.stage, sinks), []).append(Entry(demand_idx, shard_idx, unit))
    return groups


def _served(
    units: tuple[Unit, ...], unit_idx: int, demand_idx: int, choice: Choice, nodes: Nodes
) -> Iterator[tuple[Holder, tuple[int, ...]]]:
    unit = units[unit_idx]
    if unit.follows >= 0:
        yield from _following(units, unit, demand_idx, choice, nodes)
        return
    for route_idx, route in enumerate(unit.routes):
        if len(route.candidates) == 1:
            yield route.candidates[0], route.sinks
        else:
            yield choice[(demand_idx, unit_idx, route_idx)], route.sinks


def _following(
    units: tuple[Unit, ...], unit: Unit, demand_idx: int, choice: Choice, nodes: Nodes
) -> Iterator[tuple[Holder, tuple[int, ...]]]:
    """Scales come from a rank that quantises their blocks: the one that serves the sink's node, else any."""
    senders: dict[int, Holder] = {}
    for holder, sinks in _served(units, unit.follows, demand_idx, choice, nodes):
        for sink_idx in sinks:
            senders.setdefault(nodes.sink_node[sink_idx], holder)
    near = {nodes.source_node[rank]: (rank, shard_idx) for rank, shard_idx in senders.values()}
    first = next(iter(senders.values()))
    by_holder: dict[Holder, list[int]] = {}
    for route in unit.routes:
        for sink_idx in route.sinks:
            node = nodes.sink_node[sink_idx]
            by_holder.setdefault(near.get(node) or senders.get(node) or first, []).append(sink_idx)
    for holder, group in sorted(by_holder.items()):
        yield holder, tuple(sorted(group))


class Trees:
    """Delivery trees: the sender to one sink of each node that needs the bucket, that sink to the others there.

    The head of a node is the sink that has carried least so far. Nobody relays what it does not need.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._carried = [0] * len(nodes.sink_node)

    def hops(self, sinks: tuple[int, ...], nbytes: int) -> tuple[tuple[int, int], ...]:
        """The tree of a bucket of ``nbytes`` that ``sinks`` need, as (from, to), in order."""
        by_node: dict[int, list[int]] = {}
        for sink_idx in sinks:
            by_node.setdefault(self._nodes.sink_node[sink_idx], []).append(sink_idx)
        first: list[tuple[int, int]] = []
        second: list[tuple[int, int]] = []
        for _, members in sorted(by_node.items()):
            head = min(members, key=lambda s: (self._carried[s], s))
            self._carried[head] += nbytes * len(members)
            first.append((SOURCE, head))
            second += [(head, s) for s in members if s != head]
        return (*first, *second)
