"""What a simulation has to do, in numbers: ranks, roads, streams of buckets. Knows neither plans nor manifests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wsync.errors import ConfigError
from wsync.plan.places import Lane
from wsync.sim.engine import Job, Path
from wsync.sim.fabric import Fabric

SENDER = 0
"""The slot of the trainer rank in a road; the others are the hops' targets, from 1."""


@dataclass(slots=True)
class Leg:
    """One hop of a road.

    Attributes:
        slot: that it reaches.
        rail: that it was planned on.
        path: resources that it occupies now.
        passes: bytes through them for each byte on the wire.
    """

    slot: int
    rail: int
    path: Path
    passes: float = 1.0


class Road:
    """One delivery tree from one trainer rank, laid over the resources.

    Args:
        fabric: for the paths.
        home: of the trainer rank.
        hops: (slot, slot, rail), every slot but `SENDER` the target of one, senders before they send.
        sinks: sink index at each slot, that of `SENDER` is -1.
        lanes: of each sink.

    Attributes:
        sinks: sink index at each slot.
        parents: slot that each slot gets its buckets from.
        legs: by sending slot.
    """

    __slots__ = ("_home", "_lanes", "fabric", "legs", "parents", "sinks")

    def __init__(
        self,
        fabric: Fabric,
        home: Lane,
        hops: Sequence[tuple[int, int, int]],
        sinks: Sequence[int],
        lanes: Sequence[Lane],
    ) -> None:
        self.fabric = fabric
        self.sinks = tuple(sinks)
        self._home = home
        self._lanes = lanes
        self.parents = [-1] * len(sinks)
        self.legs: list[list[Leg]] = [[] for _ in sinks]
        for a, b, rail in hops:
            self.parents[b] = a
            passes = fabric.hop_passes(self.lane(a), self.lane(b))
            self.legs[a].append(Leg(b, rail, self.path(a, b, rail), passes))

    def lane(self, slot: int) -> Lane:
        """Where a slot's rank runs."""
        return self._home if slot == SENDER else self._lanes[self.sinks[slot]]

    def path(self, a: int, b: int, rail: int) -> Path:
        """Resources between two slots, as the fabric is now.

        Raises:
            ConfigError: no port is left.
        """
        here, there = self.lane(a), self.lane(b)
        path = self.fabric.path(here, there, rail)
        if path is None:
            names = self.fabric.nodes.names
            raise ConfigError(
                f"bytes go from node {names[here.node]!r} to node {names[there.node]!r}, but one of them has no port"
            )
        return path


@dataclass(slots=True)
class Stream:
    """What one trainer rank sends along one road, in order.

    Attributes:
        rank: the trainer rank.
        stage: ranks pack all buckets of a lower stage first.
        road: that all its buckets take.
        nbytes: on the wire, all buckets together.
        num_buckets: that they are cut into, equal but for the last.
        read_bytes: of trainer memory that packing reads for each wire byte.
        weight_bytes: of these, weights, which an offloaded rank gathers before.
        waits: packing needs the exchanged amaxes.
    """

    rank: int
    stage: int
    road: Road
    nbytes: int
    num_buckets: int
    read_bytes: float = 1.0
    waits: bool = False
    weight_bytes: float = 1.0

    def sizes(self) -> Iterator[int]:
        """Wire bytes of each bucket."""
        full = -(-self.nbytes // self.num_buckets)
        for i in range(self.num_buckets):
            yield min(full, self.nbytes - i * full)


@dataclass(slots=True)
class Bucket:
    """One bucket.

    Attributes:
        stream: that it belongs to.
        nbytes: on the wire.
        have: one bit for each slot of the road that has it.
    """

    stream: Stream
    nbytes: int
    have: int = 0


@dataclass
class Work:
    """Everything that one update has to do.

    Attributes:
        fabric: with all resources.
        replica_of: name of the replica of each sink.
        streams: of all trainer ranks.
        amax_s: seconds until scaled buckets may be packed.
    """

    fabric: Fabric
    replica_of: list[str]
    streams: list[Stream]
    amax_s: float = 0.0

    @property
    def sources(self) -> tuple[Lane, ...]:
        """Where the trainer ranks are."""
        return self.fabric.nodes.sources

    @property
    def sinks(self) -> tuple[Lane, ...]:
        """Where the engine ranks are."""
        return self.fabric.nodes.sinks

    def gather_job(self, bucket: Bucket, tag: int) -> Job:
        """A job that brings the weights of a bucket from host memory to the GPU that packs them."""
        path = self.fabric.from_host(self.sources[bucket.stream.rank])
        return Job(bucket, tag, path, round(bucket.nbytes * bucket.stream.weight_bytes))

    def pack_job(self, bucket: Bucket, tag: int) -> Job:
        """A job that reads trainer memory and writes a bucket."""
        stream = bucket.stream
        costs = self.fabric.costs
        passes = None if costs is None else costs.pack
        return self._memory_job(self.sources[stream.rank], bucket, tag, bucket.nbytes, stream.read_bytes, passes)

    def install_job(self, sink_idx: int, tag: int, nbytes: int) -> Job:
        """A job that reads staged bytes and writes live memory; from host memory in one pass over PCIe."""
        lane, costs = self.sinks[sink_idx], self.fabric.costs
        if lane.in_host:
            return Job(None, tag, (*self.fabric.from_host(lane), *self.fabric.memory(lane)), nbytes)
        passes = None if costs is None else costs.install
        return self._memory_job(lane, None, tag, nbytes, 1.0, passes)

    def _memory_job(
        self, lane: Lane, owner: Bucket | None, tag: int, nbytes: int, read: float, passes: float | None
    ) -> Job:
        """One pass that writes ``nbytes`` and reads ``read`` for each of them.

        Rates of GPU memory count reads and writes, rates of host memory are those of a copy, which does both.
        """
        moved = nbytes * (read + 1.0)
        if lane.gpu < 0:
            moved = moved / 2 if passes is None else nbytes * passes
        return Job(owner, tag, self.fabric.memory(lane), round(moved))

    def queue_of(self, rank: int) -> list[Bucket]:
        """A rank's buckets in the order in which it packs them: its flows take turns by their progress."""
        order: list[tuple[int, float, int, Bucket]] = []
        for k, stream in enumerate(self.streams):
            if stream.rank == rank:
                order += [
                    (stream.stage, i / stream.num_buckets, k, Bucket(stream, n)) for i, n in enumerate(stream.sizes())
                ]
        order.sort(key=lambda entry: entry[:3])
        return [entry[3] for entry in order]
