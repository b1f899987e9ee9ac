"""From routes to flows: every share of a group becomes whole pieces of whole tensors, in one flow per tree.

A share is a number of bytes; a flow has pieces. Lots are cut between tensors, and what one share gets too much or too
little is made up for by the sender's next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wsync.errors import ConfigError
from wsync.plan.classes import TensorClass
from wsync.plan.flows import DemandGroup, Entry, Flow, Lot, Route, Routing, Share
from wsync.plan.groups import OpenGroups
from wsync.plan.nodes import Nodes
from wsync.plan.packing import bucket_room, max_buckets
from wsync.plan.rank_classes import Sinks
from wsync.plan.types import ALIGNMENT


class Parcel(NamedTuple):
    """Some members' pieces of one unit, and the flow that takes them."""

    src_rank: int
    stage: int
    tree_idx: int
    class_idx: int
    unit_idx: int
    first: int
    end: int


class _Range(NamedTuple):
    """A lot of some members."""

    class_idx: int
    unit_idx: int
    nbytes: int
    first: int
    end: int


@dataclass
class Parcels:
    """Shares groups out, and sends scales after the weights that they follow.

    Attributes:
        classes: of tensors.
        found: everything that was shared out.
    """

    classes: list[TensorClass]
    found: list[Parcel] = field(default_factory=list)
    _owed: dict[tuple[int, int], int] = field(default_factory=dict)
    _followed: dict[tuple[int, int], list[tuple[Route, Parcel]]] = field(default_factory=dict)

    def share_out(self, groups: Sequence[DemandGroup], routing: Routing, open_groups: OpenGroups) -> None:
        """Parcels of all groups that are routed for themselves."""
        wanted = {(c, self.classes[c].blocks.units[u].follows) for c, u in open_groups.following}
        for group, routes in zip(groups, routing.routes, strict=True):
            ranges = [_whole(lot) for lot in group.lots]
            for route in routes:
                for parcel in self._cut(ranges, route.shares, group.stage):
                    self.found.append(parcel)
                    if (parcel.class_idx, parcel.unit_idx) in wanted:
                        key = (parcel.class_idx, parcel.unit_idx)
                        self._followed.setdefault(key, []).append((route, parcel))

    def follow(self, open_groups: OpenGroups, sinks: Sinks, nodes: Nodes) -> list[tuple[DemandGroup, list[_Range]]]:
        """Send scales along the trees of their weights.

        Returns:
            Groups of scales that go to other sinks than their weights, each with a single holder and with the members
            of its lots. They are routed for themselves, and added by `share_out_rest`.
        """
        rest: dict[tuple[int, tuple[int, ...]], list[_Range]] = {}
        for class_idx, unit_idx in open_groups.following:
            cls = self.classes[class_idx]
            unit = cls.blocks.units[unit_idx]
            same = unit.needers == cls.blocks.units[unit.follows].needers
            nbytes = cls.wire_bytes(unit)
            parcels = self._followed[(class_idx, unit.follows)]
            sinks_of = {} if same else _by_route(parcels, sinks.of(cls.needers(unit)), nodes)
            for route, parcel in parcels:
                wanted = route.sinks if same else sinks_of[route.sinks]
                if wanted == route.sinks:
                    self.found.append(parcel._replace(stage=1, unit_idx=unit_idx))
                elif wanted:
                    lot = _Range(class_idx, unit_idx, nbytes, parcel.first, parcel.end)
                    rest.setdefault((parcel.src_rank, wanted), []).append(lot)
        return [(_rest_group(rank, wanted, ranges), ranges) for (rank, wanted), ranges in sorted(rest.items())]

    def share_out_rest(self, rest: list[tuple[DemandGroup, list[_Range]]], routing: Routing, first_tree: int) -> None:
        """Parcels of what `follow` returned; ``first_tree`` is the number of the routing's first tree."""
        for (group, ranges), routes in zip(rest, routing.routes, strict=True):
            for route in routes:
                for parcel in self._cut(ranges, route.shares, group.stage):
                    self.found.append(parcel._replace(tree_idx=parcel.tree_idx + first_tree))

    def _cut(self, ranges: list[_Range], shares: tuple[Share, ...], stage: int) -> Iterator[Parcel]:
        if len(shares) == 1:
            src_rank, tree_idx, _ = shares[0]
            for r in ranges:
                yield Parcel(src_rank, stage, tree_idx, r.class_idx, r.unit_idx, r.first, r.end)
            return
        # What a sender was given too little of before it gets more of now; with one sender, its trees share like this.
        several = len({s.src_rank for s in shares}) > 1
        keys = [(s.src_rank, -1) if several else (s.src_rank, s.tree_idx) for s in shares]
        wanted = [max(s.nbytes + self._owed.get(key, 0), 0) for s, key in zip(shares, keys, strict=True)]
        for i, r, first, end in _cut_ranges(ranges, wanted):
            share = shares[i]
            self._owed[keys[i]] = self._owed.get(keys[i], 0) - r.nbytes * (end - first)
            yield Parcel(share.src_rank, stage, share.tree_idx, r.class_idx, r.unit_idx, first, end)
        for share, key in zip(shares, keys, strict=True):
            self._owed[key] = self._owed.get(key, 0) + share.nbytes


def _whole(lot: Lot) -> _Range:
    return _Range(lot.class_idx, lot.unit_idx, lot.nbytes, 0, lot.num_members)


def _cut_ranges(ranges: list[_Range], wanted: list[int]) -> Iterator[tuple[int, _Range, int, int]]:
    """Cut between members, as near to the ``wanted`` bytes as whole pieces allow; the last one takes what is left.

    Yields (index into ``wanted``, the range, its first member, the end).
    """
    at, target, idx = 0, 0, 0
    first = ranges[0].first
    for i, nbytes in enumerate(wanted):
        target += nbytes
        while idx < len(ranges):
            r = ranges[idx]
            count = r.end - first
            if i < len(wanted) - 1 and r.nbytes:
                count = min(count, max((2 * (target - at) + r.nbytes) // (2 * r.nbytes), 0))
            if count:
                yield i, r, first, first + count
                at += r.nbytes * count
                first += count
            if first < r.end:
                break
            idx += 1
            first = ranges[idx].first if idx < len(ranges) else 0


def _by_route(
    followed: list[tuple[Route, Parcel]], sinks: tuple[int, ...], nodes: Nodes
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Which of ``sinks`` each route serves, by the route's own sinks.

    All on an island that a route serves are that route's. The others are with the rest of their zone, on the route that
    enters it: a rank that joins gets what any rank of its zone gets, and an island is entered twice if two ranks of it
    have twins on two routes. In a zone that none enters they are with those that a trainer rank serves there, else on
    the first route.
    """
    senders: dict[tuple[int, ...], int] = {}
    for route, parcel in followed:
        senders.setdefault(route.sinks, parcel.src_rank)
    by_island: dict[int, tuple[int, ...]] = {}
    entering: dict[int, tuple[int, ...]] = {}
    within: dict[int, tuple[int, ...]] = {}
    for served, rank in senders.items():
        start = nodes.island[nodes.source_node[rank]]
        for node in (nodes.sink_node[s] for s in served):
            island, zone = nodes.island[node], nodes.zone[node]
            by_island.setdefault(island, served)
            (within if island == start else entering).setdefault(zone, served)
    by_zone = {**within, **entering}
    found: dict[tuple[int, ...], list[int]] = {served: [] for served in senders}
    for s in sinks:
        node = nodes.sink_node[s]
        nearest = by_zone.get(nodes.zone[node], followed[0][0].sinks)
        found[by_island.get(nodes.island[node], nearest)].append(s)
    return {served: tuple(members) for served, members in found.items()}


def _rest_group(rank: int, sinks: tuple[int, ...], ranges: list[_Range]) -> DemandGroup:
    lots = tuple(Lot(r.class_idx, r.unit_idx, r.nbytes, r.end - r.first) for r in ranges)
    return DemandGroup((rank,), sinks, 1, lots, sum(lot.nbytes * lot.num_members for lot in lots))


def make_flows(parcels: list[Parcel], classes: list[TensorClass], bucket_bytes: int) -> tuple[Flow, ...]:
    """Gather parcels by sender, stage and tree, and number the flows and their buckets.

    Each sender begins with another tree than the one before, so that they do not all begin with the same sink.

    Raises:
        ConfigError: there are more buckets than can be numbered.
    """
    by_flow: dict[tuple[int, int, int], list[Parcel]] = {}
    for parcel in parcels:
        by_flow.setdefault(parcel[:3], []).append(parcel)
    trees_of: dict[tuple[int, int], list[int]] = {}
    for src_rank, stage, tree_idx in sorted(by_flow):
        trees_of.setdefault((stage, src_rank), []).append(tree_idx)
    order = sorted(
        (stage, (i - src_rank) % len(trees), src_rank, tree_idx)
        for (stage, src_rank), trees in trees_of.items()
        for i, tree_idx in enumerate(trees)
    )
    shard_of = _Shards(classes)
    first_bucket, flows = 0, []
    for stage, _, src_rank, tree_idx in order:
        flow = _flow(first_bucket, by_flow[(src_rank, stage, tree_idx)], classes, shard_of)
        flows.append(flow)
        first_bucket += bucket_room(flow.nbytes, bucket_bytes)
    if first_bucket > max_buckets(bucket_bytes):
        raise ConfigError(
            f"the plan has {len(flows)} flows with {first_bucket} numbers of buckets of {bucket_bytes} bytes; allowed "
            f"are {max_buckets(bucket_bytes)}",
            hint="choose larger or smaller bucket_bytes",
        )
    return tuple(flows)


def _flow(first_bucket: int, parcels: list[Parcel], classes: list[TensorClass], shards: _Shards) -> Flow:
    src_rank, stage, tree_idx = parcels[0][:3]
    entries: list[Entry] = []
    nbytes = wire_bytes = 0
    is_delta = False
    for _, _, _, class_idx, unit_idx, first, end in sorted(parcels):
        cls = classes[class_idx]
        unit = cls.blocks.units[unit_idx]
        padded = -(-unit.nbytes // ALIGNMENT) * ALIGNMENT
        expected = cls.wire_bytes(unit)
        is_delta |= expected < unit.nbytes
        nbytes += padded * (end - first)
        wire_bytes += (expected if expected < unit.nbytes else padded) * (end - first)
        last = entries[-1] if entries else None
        if last is not None and (last.class_idx, last.unit_idx, last.end) == (class_idx, unit_idx, first):
            entries[-1] = Entry(class_idx, unit_idx, last.shard_idx, last.first, end)
        else:
            entries.append(Entry(class_idx, unit_idx, shards.of(class_idx, unit_idx, src_rank), first, end))
    return Flow(first_bucket, src_rank, stage, tree_idx, tuple(entries), nbytes, wire_bytes if is_delta else -1)


class _Shards:
    """Which of a sender's boxes holds a unit."""

    def __init__(self, classes: list[TensorClass]) -> None:
        self._classes = classes
        self._known: dict[int, dict[int, int]] = {}

    def of(self, class_idx: int, unit_idx: int, rank: int) -> int:
        holders = self._classes[class_idx].blocks.units[unit_idx].holders
        found = self._known.get(id(holders))
        if found is None:
            found = self._known[id(holders)] = dict(holders)
        return found[rank]
