"""What fails while an update is under way, and how it goes on.

A port that fails takes the buckets that cross it along; they are sent again over another port of the node once the
failure is noticed. A node that fails, or has a rank without a port left, takes its replicas along. Whoever had received
from it receives from the next node up its tree. Without a trainer node nothing more can be packed: the update ends for
all replicas that had not got everything. What fails after the last replica has committed or left changes nothing.
"""

from __future__ import annotations

from wsync.sim.engine import Job
from wsync.sim.sync import Sync
from wsync.sim.work import SENDER, Bucket, Road


class Faults:
    """Failures that are scheduled on a `Sync`.

    Args:
        sync: before it runs.
        detect_s: from a failure until its peers act on it.

    Attributes:
        log: what happened, in order, as (seconds, words).
        resent: buckets that were sent again.
        adopted: hops that got another sender.
        late: failures that came after the end, as (seconds, words).
    """

    def __init__(self, sync: Sync, detect_s: float) -> None:
        self._sync = sync
        self._detect_s = detect_s
        self._fabric = sync.work.fabric
        self._lost_nodes: set[int] = set()
        self._noticed: set[int] = set()
        self.log: list[tuple[float, str]] = []
        self.late: list[tuple[float, str]] = []
        self.resent = 0
        self.adopted = 0

    def schedule_port(self, node: int, number: int, time_s: float) -> None:
        """One port of a node fails, both directions.

        Raises:
            ConfigError: the node has no such port.
        """
        nic = self._fabric.port_index(node, number)
        self._sync.engine.at(time_s, lambda now: self._lose_port(nic, now))

    def schedule_node(self, node: int, time_s: float) -> None:
        """A whole node fails."""
        name = self._fabric.nodes.names[node]
        self._sync.engine.at(time_s, lambda now: self._lose_node(node, now, f"node {name} failed"))

    def _lose_port(self, nic: int, now: float) -> None:
        node = self._fabric.nodes.nics[nic].node
        name = self._fabric.nodes.names[node]
        if node in self._lost_nodes:
            return
        words = f"port {self._fabric.nodes.nics[nic].slot} of node {name} failed"
        if self._is_late(now, words):
            return
        lost = self._fabric.lose_port(nic)
        self.log.append((now, words))
        lanes = [*self._sync.work.sources, *self._sync.work.sinks]
        if any(lane.node == node and self._fabric.is_cut_off(lane) for lane in lanes):
            self._lose_node(node, now, f"node {name} has a rank without a port")
            return
        jobs = self._cut(lost)
        for road in self._roads():
            self._lay_again(road, lost)
        self._sync.engine.at(now + self._detect_s, lambda _: self._send_again(jobs))

    def _lose_node(self, node: int, now: float, words: str) -> None:
        if node in self._lost_nodes or self._is_late(now, words):
            return
        self._lost_nodes.add(node)
        self.log.append((now, words))
        self._cut(self._fabric.lose_node(node))
        sync = self._sync
        gone = {i for i, lane in enumerate(sync.work.sinks) if lane.node == node}
        sync.lost_sinks |= gone
        for replica in sync.replicas.values():
            if gone & set(replica.sinks):
                sync.drop(replica, words)
        if any(lane.node == node for lane in sync.work.sources):
            self._lose_trainer(words)
        sync.engine.at(now + self._detect_s, lambda _: self._adopt(node))

    def _is_late(self, now: float, words: str) -> bool:
        """Whether nothing is left that a failure could change."""
        if self._sync.is_over:
            self.late.append((now, words))
        return self._sync.is_over

    def _lose_trainer(self, words: str) -> None:
        """wsync ends the update when a trainer rank is lost; replicas that have everything still commit."""
        for replica in self._sync.replicas.values():
            if replica.staged_s is None:
                self._sync.drop(replica, f"{words}, and with it trainer ranks")

    def _cut(self, lost: set[int]) -> list[Job]:
        """Cancel what crosses lost resources, and stop them."""
        jobs = self._sync.engine.cancel(lambda job: not lost.isdisjoint(job.path))
        self._sync.engine.lose(lost)
        return [job for job in jobs if job.tag > SENDER]

    def _roads(self) -> list[Road]:
        return list({id(s.road): s.road for s in self._sync.work.streams}.values())

    def _lay_again(self, road: Road, lost: set[int]) -> None:
        """Lead the legs that cross lost ports over others."""
        for slot, legs in enumerate(road.legs):
            for leg in legs:
                ends_live = not (self._is_lost(road, slot) or self._is_lost(road, leg.slot))
                if ends_live and not lost.isdisjoint(leg.path):
                    leg.path = road.path(slot, leg.slot, leg.rail)

    def _send_again(self, jobs: list[Job]) -> None:
        """Send what a failed port has cut, unless another sender has been given it meanwhile."""
        under_way = self._under_way()
        for job in jobs:
            self._send_if_missing(job.owner, job.tag, under_way)

    def _adopt(self, node: int) -> None:
        """Give every slot whose sender is gone the next one up that lives, and let that one send what is missing."""
        self._noticed.add(node)
        moved: dict[int, list[int]] = {}
        for road in self._roads():
            slots = [slot for slot in self._orphans(road) if self._move(road, slot)]
            if slots:
                moved[id(road)] = slots
        self.adopted += sum(map(len, moved.values()))
        under_way = self._under_way()
        for bucket in self._sync.buckets:
            for slot in moved.get(id(bucket.stream.road), ()):
                self._send_if_missing(bucket, slot, under_way)

    def _under_way(self) -> set[tuple[int, int]]:
        return {(id(job.owner), job.tag) for job in self._sync.engine.under_way()}

    def _send_if_missing(self, bucket: Bucket, slot: int, under_way: set[tuple[int, int]]) -> None:
        """Send a bucket to a slot that lacks it and is not about to get it, from its sender if that has it and lives.

        A sender that has failed too is replaced once that is noticed; one that lacks the bucket sends when it has it.
        """
        road = bucket.stream.road
        parent = road.parents[slot]
        sendable = bucket.have >> parent & 1 and not self._is_lost(road, parent)
        if sendable and not bucket.have >> slot & 1 and (id(bucket), slot) not in under_way:
            self.resent += 1
            self._sync.launch(bucket, next(leg for leg in road.legs[parent] if leg.slot == slot))

    def _is_lost(self, road: Road, slot: int) -> bool:
        return road.lane(slot).node in self._lost_nodes

    def _is_noticed(self, road: Road, slot: int) -> bool:
        return road.lane(slot).node in self._noticed

    def _orphans(self, road: Road) -> list[int]:
        return [
            slot
            for slot in range(SENDER + 1, len(road.sinks))
            if not self._is_lost(road, slot) and self._is_noticed(road, road.parents[slot])
        ]

    def _move(self, road: Road, slot: int) -> bool:
        """Whether somebody is left to send to a slot."""
        old = parent = road.parents[slot]
        while parent != SENDER and self._is_lost(road, parent):
            parent = road.parents[parent]
        if self._is_lost(road, parent):
            return False  # the trainer rank itself is gone
        leg = next(leg for leg in road.legs[old] if leg.slot == slot)
        road.legs[old].remove(leg)
        road.parents[slot] = parent
        # A hop that stayed inside a domain may now have to leave one node for another: over the port of its turn.
        leg.rail = leg.rail if leg.rail >= 0 else slot
        leg.path = road.path(parent, slot, leg.rail)
        road.legs[parent].append(leg)
        return True
