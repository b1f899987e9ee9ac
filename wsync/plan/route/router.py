"""Routing: groups in, routes and trees out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wsync.plan.flows import DemandGroup, Route, Routing, Share
from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.route.assign import Load, assign
from wsync.plan.route.relays import Fans
from wsync.plan.route.survey import Family, Leg, Survey
from wsync.plan.route.trees import TreeBook
from wsync.plan.types import PlanOptions

COARSE = 50
"""A load of more than one part in so many of what a NIC carries is striped over several."""
MIN_SHARE_BUCKETS = 2
"""Chains are not rotated for less than this many buckets."""


def route(groups: Sequence[DemandGroup], nodes: Nodes, bucket_bytes: int, options: PlanOptions) -> Routing:
    """Decide who sends the bytes of every group, and along which trees they reach all who need them.

    Deterministic. Trees and shares are whole numbers of bytes; shares of one group are cut at multiples of
    ``bucket_bytes``.

    Args:
        groups: what has to be carried.
        nodes: of the job.
        bucket_bytes: size of a bucket.
        options: ``relay`` allows engine ranks to pass on to other nodes what they need themselves.

    Raises:
        ConfigError: no path leads from any holder of a group to one of its needers; both nodes are named.
    """
    survey = Survey(nodes)
    survey.add(groups)
    fans = Fans(survey.legs, nodes, options.relay)
    copies = [1 if leg.family.local else fans.copies[id(leg.family)] for leg in survey.legs]
    loads = assign(survey.legs, copies, nodes, fans.speed, bucket_bytes)
    return _Striper(nodes, survey.legs, copies, fans.target, bucket_bytes).routing(len(groups), loads)


class _Striper:
    """Chooses heads, rails and rotations for every load."""

    def __init__(
        self, nodes: Nodes, legs: Sequence[Leg], copies: Sequence[int], target: int, bucket_bytes: int
    ) -> None:
        self.nodes = nodes
        self.legs = legs
        self.copies = copies
        self.bucket_bytes = bucket_bytes
        self.book = TreeBook(nodes)
        self.cost = np.array([byte_cost(n.rate_gbps) for n in nodes.nics], dtype=np.float64)
        self.nic_out = np.zeros(len(nodes.nics))
        self.nic_in = np.zeros(len(nodes.nics))
        self.target = float(target)
        self.carried = [0] * len(nodes.sinks)
        self.position: dict[int, int] = {}
        self.crowded = self._find_crowded()

    def _find_crowded(self) -> set[int]:
        """NICs that would be late if every family with one needer on an island took its straight way."""
        straight = np.zeros(len(self.nodes.nics))
        for family in {id(leg.family): leg.family for leg in self.legs if not leg.family.local}.values():
            doors = self.book.doors(family)
            if doors.single:
                np.add.at(straight, doors.nics[0], family.nbytes)
        return set(np.nonzero(straight * self.cost > self.target * 1.005)[0].tolist())

    def routing(self, num_groups: int, loads: Sequence[Load]) -> Routing:
        shares: list[list[Share]] = [[] for _ in self.legs]
        for load in loads:
            leg = self.legs[load.leg_idx]
            if leg.family.local:
                shares[load.leg_idx] += self._local(leg.family, load)
            else:
                shares[load.leg_idx] += self._remote(leg.family, load)
        routes: list[list[Route]] = [[] for _ in range(num_groups)]
        for leg, found in zip(self.legs, shares, strict=True):
            routes[leg.group_idx].append(Route(leg.family.sinks, tuple(_merged(found))))
        return Routing(self.book.trees, [tuple(r) for r in routes])

    def _local(self, family: Family, load: Load) -> list[Share]:
        """Heads take turns; only what would load one head by itself is cut."""
        members = family.members[0]
        if len(members) == 1:
            return [Share(load.rank, self.book.local(family, members[0]), load.nbytes)]
        out = []
        for nbytes in self._pieces(load.nbytes, len(members), family.nbytes * len(members) // COARSE):
            head = min(members, key=lambda s: (self.carried[s], s))
            self.carried[head] += nbytes * len(members)
            out.append(Share(load.rank, self.book.local(family, head), nbytes))
        return out

    def _pieces(self, nbytes: int, count: int, coarse: int) -> list[int]:
        """Cut into ``count`` parts of whole buckets if it is coarse, else not at all."""
        if count == 1 or nbytes <= coarse or nbytes < 2 * self.bucket_bytes:
            return [nbytes]
        unit = self.bucket_bytes
        buckets = -(-nbytes // unit)
        ends = [min(nbytes, (i + 1) * buckets // count * unit) for i in range(count)]
        starts = [0, *ends[:-1]]
        return [b - a for a, b in zip(starts, ends, strict=True) if b > a]

    def _remote(self, family: Family, load: Load) -> list[Share]:
        doors = self.book.doors(family)
        reach = self.nodes.sources[load.rank].reach
        count = max(doors.count, len(reach))
        coarse = int(self.target / float(self.cost[list(reach)].min()) / COARSE)
        if doors.single and not self._is_late(family, load):
            return self._rotated(family, load, 0, load.nbytes)
        out = []
        for nbytes in self._pieces(load.nbytes, count, coarse):
            way = self._best_way(family, load.rank, count)
            out += self._rotated(family, load, way, nbytes)
        return out

    def _is_late(self, family: Family, load: Load) -> bool:
        """Whether the straight way would make a NIC late."""
        doors = self.book.doors(family)
        if self.crowded and not self.crowded.isdisjoint(doors.nics[0].tolist()):
            return True
        nic = self.nodes.source_nic(load.rank, doors.at(0, 0).rail)
        nbytes = load.nbytes * self.copies[load.leg_idx]
        return bool(self.nic_out[nic] + nbytes * self.cost[nic] > self.target * 1.005)

    def _best_way(self, family: Family, rank: int, count: int) -> int:
        """The way whose NICs are done first; at a tie the sender's own NIC."""
        doors = self.book.doors(family)
        lane = self.nodes.sources[rank]
        best = None
        for way in range(count):
            nics = doors.nics[way % doors.count]
            out = lane.reach[doors.at(0, way).rail % len(lane.reach)]
            done = max(float(self.nic_out[out]), float(self.nic_in[nics].max()))
            key = (done, out not in lane.own, way)
            if best is None or key < best:
                best = key
        return best[2] if best else 0

    def _rotated(self, family: Family, load: Load, way: int, nbytes: int) -> list[Share]:
        """Cut where the family's chains move on by one island, and count what NICs carry."""
        copies, count = self.copies[load.leg_idx], len(family.islands)
        doors = self.book.doors(family)
        out_nic = self.nodes.source_nic(load.rank, doors.at(0, way).rail)
        self.nic_out[out_nic] += nbytes * copies * self.cost[out_nic]
        nics = doors.nics[way % doors.count]
        self.nic_in[nics] += nbytes * self.cost[nics]
        if copies == count:
            return [Share(load.rank, self.book.remote(family, count, 0, way), nbytes)]
        steps = min(count, max(1, family.nbytes // (MIN_SHARE_BUCKETS * self.bucket_bytes)))
        at = self.position.get(id(family), 0)
        self.position[id(family)] = at + nbytes
        out = []
        end = at + nbytes
        while at < end:
            step = at * steps // family.nbytes
            edge = -(-(step + 1) * family.nbytes // steps)
            take = end - at
            if edge < end:
                take = max(1, round((edge - at) / self.bucket_bytes)) * self.bucket_bytes
                take = min(take, end - at)
            rotation = step % steps * count // steps
            out.append(Share(load.rank, self.book.remote(family, copies, rotation, way), take))
            at += take
        return out


def _merged(shares: Sequence[Share]) -> list[Share]:
    """Shares of one sender along one tree are one."""
    total: dict[tuple[int, int], int] = {}
    for share in shares:
        key = (share.src_rank, share.tree_idx)
        total[key] = total.get(key, 0) + share.nbytes
    return [Share(rank, tree, n) for (rank, tree), n in total.items()]
