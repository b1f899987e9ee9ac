"""A whole crew of transport ends for a hand-made plan: what the contract suite and the benchmarks drive."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import msgspec

from wsync.plan.types import SOURCE, Bucket, Piece, SinkSlice, SourceSlice
from wsync.spec.box import Box
from wsync.testing.transport_actors import Actor, ActorPool, Answer, Command, content, content_digest, hash_of


class HandPlan(msgspec.Struct, frozen=True):
    """Slices made by hand, so that a transport's tests need no planner.

    Attributes:
        sources: slices by trainer rank.
        sinks: slices by sink index.
    """

    sources: tuple[SourceSlice, ...]
    sinks: tuple[SinkSlice, ...]


def hand_plan(
    num_sources: int = 2,
    num_sinks: int = 2,
    buckets_per_source: int = 4,
    bucket_bytes: int = 64 << 10,
    chain: bool = False,
    amax_elements: int = 0,
    digest: str = "plan-a",
) -> HandPlan:
    """Buckets of different fill that all sinks share, but for every third, which is for one sink only.

    Args:
        chain: sinks relay to one another instead of all getting the bucket from the source.
    """
    buckets: list[list[Bucket]] = []
    for rank in range(num_sources):
        mine = []
        for k in range(buckets_per_source):
            idx = rank * buckets_per_source + k
            sinks = (idx % num_sinks,) if k % 3 == 2 else tuple(range(num_sinks))
            used = bucket_bytes - 256 * (k % 4)
            piece = Piece(0, 0, Box((0,), (used,)), 0, 0, used)
            mine.append(Bucket(idx, rank, 0, used, (piece,), sinks, _hops(sinks, chain)))
        buckets.append(mine)
    everything = [bucket for mine in buckets for bucket in mine]
    return HandPlan(
        tuple(
            SourceSlice(digest, rank, bucket_bytes, (), tuple(mine), (), amax_elements)
            for rank, mine in enumerate(buckets)
        ),
        tuple(
            SinkSlice(digest, sink, bucket_bytes, (), tuple(b for b in everything if sink in b.sinks))
            for sink in range(num_sinks)
        ),
    )


def _hops(sinks: tuple[int, ...], chain: bool) -> tuple[tuple[int, int], ...]:
    senders = (SOURCE, *sinks[:-1]) if chain else (SOURCE,) * len(sinks)
    return tuple(zip(senders, sinks, strict=True))


class Crew:
    """The actors of a plan. Entering prepares and connects them all, leaving closes them."""

    def __init__(
        self,
        pool: ActorPool,
        transport: str,
        plan: HandPlan,
        source_factory: str = "wsync.transport:open_source",
        sink_factory: str = "wsync.transport:open_sink",
    ) -> None:
        self.plan = plan
        self._pool = pool
        self._transport = transport
        self._factories = (source_factory, sink_factory)
        actors = pool.take(len(plan.sources) + len(plan.sinks))
        self.sources = actors[: len(plan.sources)]
        self.sinks = actors[len(plan.sources) :]
        self.source_offers: tuple[bytes, ...] = ()
        self.sink_offers: tuple[bytes, ...] = ()

    @property
    def actors(self) -> list[Actor]:
        """Sources, then sinks."""
        return [*self.sources, *self.sinks]

    def prepare(self) -> list[Answer]:
        """Open and prepare all ends; keeps their offers."""
        for actor, source in zip(self.sources, self.plan.sources, strict=True):
            actor.ask(
                Command(
                    "open_source",
                    factory=self._factories[0],
                    transport=self._transport,
                    slice_=msgspec.msgpack.encode(source),
                    num_sources=len(self.plan.sources),
                )
            )
        for actor, sink in zip(self.sinks, self.plan.sinks, strict=True):
            actor.ask(
                Command(
                    "open_sink",
                    factory=self._factories[1],
                    transport=self._transport,
                    slice_=msgspec.msgpack.encode(sink),
                )
            )
        answers = [actor.answer() for actor in self.actors]
        self.source_offers = tuple(answer.offer for answer in answers[: len(self.sources)])
        self.sink_offers = tuple(answer.offer for answer in answers[len(self.sources) :])
        return answers

    def connect_command(self, deadline_s: float = 20.0, cancel_after_s: float = -1.0) -> Command:
        """What every end has to do to connect."""
        return Command(
            "connect",
            source_offers=self.source_offers,
            sink_offers=self.sink_offers,
            deadline_s=deadline_s,
            cancel_after_s=cancel_after_s,
        )

    def connect(self, deadline_s: float = 20.0) -> list[Answer]:
        """Connect all ends."""
        return ask_all(self.actors, self.connect_command(deadline_s))

    def sync(
        self,
        version: int,
        vectors: Sequence[tuple[float, ...]] = (),
        copy_out: bool = False,
        shares: Sequence[float] = (),
    ) -> list[Answer]:
        """A whole version, from all sources to all sinks; answers of sources, then of sinks."""
        for sink in self.sinks:
            sink.ask(Command("receive", version=version, copy_out=copy_out))
        for rank, source in enumerate(self.sources):
            vector = vectors[rank] if vectors else ()
            share = shares[rank] if shares else 1.0
            source.ask(Command("publish", version=version, vector=vector, copy_out=copy_out, share=share))
        return [actor.answer() for actor in self.actors]

    def expected(self, sink: int, version: int, shares: Sequence[float] = ()) -> set[tuple[int, int, str]]:
        """(position, digest, sha1) of every bucket that a sink must find."""
        found = set()
        for pos, bucket in enumerate(self.plan.sinks[sink].buckets):
            raw = content(version, bucket.bucket_idx, bucket.used_bytes)
            share = shares[bucket.src_rank] if shares else 1.0
            sent = raw[: max(1, int(share * len(raw)))]
            found.add((pos, content_digest(version, bucket.bucket_idx), hash_of(sent)))
        return found

    def close(self) -> None:
        """Close all ends that live."""
        living = [actor for actor in self.actors if actor.reusable]
        ask_all(living, Command("close"))
        self._pool.give_back(self.actors)

    def __enter__(self) -> Crew:
        try:
            for answer in (*self.prepare(), *self.connect()):
                if answer.error:
                    raise RuntimeError(f"the crew could not connect: {answer.error}: {answer.message}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask_all(actors: Sequence[Actor], command: Command) -> list[Answer]:
    """The same command to all, at the same time."""
    for actor in actors:
        actor.ask(command)
    return [actor.answer() for actor in actors]
