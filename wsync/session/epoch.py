"""An epoch: one membership, the plan that all its ranks hold, and how far they are with setting it up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from wsync.errors import ConfigError
from wsync.plan import CompactSlice, Plan, Planner, compact_sink, compact_source, plan_digest
from wsync.session.membership import Client, Membership, sink_manifest
from wsync.session.messages import Connect, Setup, ToClient, Totals
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import SourceManifest
from wsync.spec.serde import encode

Outbox = Callable[[Client, ToClient], None]
"""Queues a message for a client."""


@dataclasses.dataclass
class Epoch:
    """A plan that all members hold, and how far they are with it.

    Attributes:
        number: grows with every change of membership.
        plan, digest: what everybody holds.
        sources: trainer ranks in order.
        replicas: engine ranks by replica, in the plan's order.
        totals: bytes of each publish.
        offers: of the ranks that compiled their slice.
        ready: ranks that reached every end.
        held_seq: the publish whose wire bytes every rank holds, whole and verified; 0: there is none for sure.
        num_deltas: publishes since the last whole one.
    """

    number: int
    plan: Plan
    digest: str
    sources: list[Client]
    replicas: dict[str, list[Client]]
    totals: Totals
    offers: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    ready: set[bytes] = dataclasses.field(default_factory=set)
    held_seq: int = 0
    num_deltas: int = 0

    @property
    def sinks(self) -> list[Client]:
        """Engine ranks in the plan's order."""
        return [c for ranks in self.replicas.values() for c in ranks]

    @property
    def clients(self) -> list[Client]:
        """All members, trainer ranks first."""
        return self.sources + self.sinks

    def is_of(self, replicas: dict[str, list[Client]]) -> bool:
        """Whether the epoch has exactly these replicas, and everybody is ready."""
        same = {n: [c.uid for c in r] for n, r in replicas.items()} == {
            n: [c.uid for c in r] for n, r in self.replicas.items()
        }
        return same and self.ready >= {c.uid for c in self.clients}

    def send_setup(self, send: Outbox, transport: str, deadline_s: float, *, delta: bool = False) -> None:
        """Give every rank its slice."""
        num_sources = len(self.sources)

        def setup(client: Client, slice_: CompactSlice) -> None:
            send(client, Setup(self.number, self.digest, transport, num_sources, deadline_s, encode(slice_), delta))

        for rank, client in enumerate(self.sources):
            setup(client, compact_source(self.plan, rank, self.digest))
        for idx, client in enumerate(self.sinks):
            setup(client, compact_sink(self.plan, idx, self.digest))

    def next_base(self, anchor_every: int) -> int:
        """What the publish that begins now is a delta against; 0 means that it is whole."""
        base, self.held_seq = self.held_seq, 0
        if self.num_deltas + 1 >= anchor_every:
            base = 0
        self.num_deltas = self.num_deltas + 1 if base else 0
        return base

    def send_connect(self, send: Outbox, deadline_s: float) -> None:
        """Give every rank everybody's offers."""
        connect = Connect(
            self.number,
            deadline_s,
            tuple(self.offers[c.uid] for c in self.sources),
            tuple(self.offers[c.uid] for c in self.sinks),
        )
        for client in self.clients:
            send(client, connect)


def new_epoch(
    number: int,
    members: Membership,
    replicas: dict[str, list[Client]],
    planner: Planner | None,
) -> Epoch:
    """Plan for these replicas.

    Args:
        number: of the epoch.
        members: everybody.
        replicas: that take part.
        planner: of this trainer; None while it is not complete.

    Raises:
        ConfigError: the plan cannot be made.
    """
    if members.source is None or planner is None:
        raise ConfigError("no trainer manifest")
    plan = planner.plan(sink_manifest(replicas))
    sources = [client for _, client in sorted(members.sources.items())]
    return Epoch(number, plan, plan_digest(plan), sources, replicas, _totals(members.source, plan))


def _totals(source: SourceManifest, plan: Plan) -> Totals:
    return Totals(
        logical_bytes=sum(itemsize(t.dtype) * math.prod(t.shape) for t in source.tensors if t.alias_of is None),
        wire_bytes=plan.wire_bytes,
        sink_bytes=plan.sink_bytes,
        staging_bytes=sum(plan.source_buckets) * plan.bucket_bytes,
    )
