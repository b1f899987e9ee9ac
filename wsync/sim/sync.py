"""One update, simulated: pack, send, relay, unpack, vote, commit."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

from wsync.sim.engine import Engine, Job
from wsync.sim.work import SENDER, Bucket, Leg, Work

COMMITTED = "committed"
SERVING_OLD = "old version serving"
POISONED = "poisoned"

_PACK = 0
_GATHER = 1 << 30
"""Tags of local steps. Tags from 1 are the slot that a hop reaches, negative ones the sink that installs."""


@dataclass
class Replica:
    """Progress of one replica.

    Attributes:
        name: of the replica.
        sinks: its ranks.
        waiting: ranks that lack buckets.
        installing: ranks whose live memory is not complete.
        staged_s, commit_s: when it had everything, and when it served it; None before.
        decided: its vote has passed.
        wrote: its ranks have begun to write live memory.
        fault: why it was dropped, or empty.
        dropped_s: when.
    """

    name: str
    sinks: list[int] = field(default_factory=list)
    waiting: int = 0
    installing: int = 0
    staged_s: float | None = None
    commit_s: float | None = None
    decided: bool = False
    wrote: bool = False
    fault: str = ""
    dropped_s: float | None = None

    @property
    def state(self) -> str:
        """As `CommitError.replicas` says it."""
        if self.commit_s is not None:
            return COMMITTED
        return POISONED if self.wrote else SERVING_OLD


@dataclass
class Times:
    """When phases ended, in seconds from the publish."""

    amax_s: float = 0.0
    packed_s: float = 0.0
    staged_s: float = 0.0


class Sync:
    """A simulated update.

    Args:
        work: what is to be done.
        in_place: engines write each bucket into live memory as it comes, instead of all of them after the vote.
        start_s: from the publish to the first packing.
        vote_s: from the last rank that is staged to the decision on all ranks.
        merge_s, jitter, seed: of the `Engine`.

    Attributes:
        engine: that runs it.
        replicas: by name.
        buckets: all of them.
        times: of phases.
        lost_sinks: ranks whose node is gone.
    """

    def __init__(
        self,
        work: Work,
        *,
        in_place: bool = False,
        start_s: float = 0.0,
        vote_s: float = 0.0,
        merge_s: float | None = None,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.work = work
        self.engine = Engine(work.fabric.resources, self._done, merge_s=merge_s, jitter=jitter, seed=seed)
        self.replicas: dict[str, Replica] = {}
        self.buckets = [b for rank in range(len(work.sources)) for b in work.queue_of(rank)]
        self.times = Times(amax_s=start_s + work.amax_s)
        self.lost_sinks: set[int] = set()
        self._alpha_s = work.fabric.nodes.cluster.alpha_s
        self._in_place = in_place
        self._start_s = start_s
        self._vote_s = vote_s
        self._missing = [0] * len(work.sinks)
        self._unwritten = [0] * len(work.sinks)
        self._received = [0] * len(work.sinks)
        self._replica = [self.replicas.setdefault(name, Replica(name)) for name in work.replica_of]
        for bucket in self.buckets:
            for sink_idx in bucket.stream.road.sinks[1:]:
                self._missing[sink_idx] += 1
        for sink_idx, replica in enumerate(self._replica):
            replica.sinks.append(sink_idx)
            replica.waiting += self._missing[sink_idx] > 0
            self._unwritten[sink_idx] = self._missing[sink_idx] if in_place else 1
            replica.installing += self._unwritten[sink_idx] > 0

    def run(self) -> float | None:
        """Simulate, and return the second at which the last replica committed; None if none did."""
        self.engine.at(self._start_s, self._start)
        self.engine.at(self._start_s + self.work.amax_s, self._start_scaled)
        # Buckets and jobs have no cycles, and there are millions of them: looking for some takes a seventh of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            self.engine.run()
        finally:
            if collects:
                gc.enable()
        return max((r.commit_s for r in self.replicas.values() if r.commit_s is not None), default=None)

    @property
    def is_over(self) -> bool:
        """Whether every replica has committed or left."""
        return all(r.commit_s is not None or r.fault for r in self.replicas.values())

    @property
    def horizon_s(self) -> float:
        """Until nothing moved any more and the last replica had committed or left."""
        ends = [t for r in self.replicas.values() for t in (r.commit_s, r.dropped_s) if t is not None]
        return max(self.engine.busy_until_s, *ends, 0.0)

    def drop(self, replica: Replica, fault: str) -> None:
        """A replica leaves the update, unless it serves the version already."""
        if replica.commit_s is None and not replica.fault:
            replica.fault, replica.dropped_s = fault, self.engine.now_s

    def launch(self, bucket: Bucket, leg: Leg) -> None:
        """Send a bucket over one leg, unless nobody is there any more."""
        if bucket.stream.road.sinks[leg.slot] not in self.lost_sinks:
            nbytes = bucket.nbytes if leg.passes == 1.0 else round(bucket.nbytes * leg.passes)
            self.engine.submit(Job(bucket, leg.slot, leg.path, nbytes, self._alpha_s))

    def _start(self, now: float) -> None:
        for replica in self.replicas.values():
            if not replica.waiting:
                self._staged(replica, now)
        self._pack(waits=False)

    def _start_scaled(self, now: float) -> None:
        self._pack(waits=True)

    def _pack(self, *, waits: bool) -> None:
        for bucket in self.buckets:
            stream = bucket.stream
            if stream.waits == waits:
                self.engine.submit(self._first_step(bucket))

    def _first_step(self, bucket: Bucket) -> Job:
        if self.work.sources[bucket.stream.rank].offloaded:
            return self.work.gather_job(bucket, _GATHER)
        return self.work.pack_job(bucket, _PACK)

    def _done(self, job: Job, now: float) -> None:
        tag = job.tag
        if tag < 0:
            self._written(-tag - 1, now)
        elif tag == _PACK:
            self._packed(job.owner, now)
        elif tag == _GATHER:
            self.engine.submit(self.work.pack_job(job.owner, _PACK))
        else:
            self._delivered(job.owner, tag, now)

    def _packed(self, bucket: Bucket, now: float) -> None:
        self.times.packed_s = now
        bucket.have = 1
        for leg in bucket.stream.road.legs[SENDER]:
            self.launch(bucket, leg)

    def _delivered(self, bucket: Bucket, slot: int, now: float) -> None:
        if bucket.have >> slot & 1:
            return  # a second sender brought what is there already
        bucket.have |= 1 << slot
        road = bucket.stream.road
        for leg in road.legs[slot]:
            self.launch(bucket, leg)
        sink_idx = road.sinks[slot]
        self._received[sink_idx] += bucket.nbytes
        if self._in_place:
            self._write(sink_idx, bucket.nbytes)
        self._missing[sink_idx] -= 1
        if not self._missing[sink_idx]:
            replica = self._replica[sink_idx]
            replica.waiting -= 1
            if not replica.waiting:
                self._staged(replica, now)

    def _staged(self, replica: Replica, now: float) -> None:
        """All ranks of a replica have everything: they vote."""
        if replica.fault:
            return
        replica.staged_s = now
        self.times.staged_s = max(self.times.staged_s, now)
        self.engine.at(now + self._vote_s, lambda decided: self._decided(replica, decided))

    def _decided(self, replica: Replica, now: float) -> None:
        if replica.fault:
            return
        replica.decided = True
        if not self._in_place:
            for sink_idx in replica.sinks:
                self._write(sink_idx, self._received[sink_idx])
        self._commit_if_done(replica, now)

    def _write(self, sink_idx: int, nbytes: int) -> None:
        """Move staged bytes into live memory. Writing begins at once: an engine that fails from here on is poisoned."""
        if nbytes:
            self._replica[sink_idx].wrote = True
        self.engine.submit(self.work.install_job(sink_idx, -sink_idx - 1, nbytes))

    def _written(self, sink_idx: int, now: float) -> None:
        self._unwritten[sink_idx] -= 1
        if self._unwritten[sink_idx]:
            return
        replica = self._replica[sink_idx]
        replica.installing -= 1
        self._commit_if_done(replica, now)

    def _commit_if_done(self, replica: Replica, now: float) -> None:
        """A replica serves the new version once that was decided and all its ranks have written it."""
        if replica.decided and not replica.installing and not replica.fault:
            replica.commit_s = now
