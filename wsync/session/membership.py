"""Who takes part: trainer ranks, engine ranks, and the replicas that these form."""

from __future__ import annotations

import dataclasses
import time

import msgspec

from wsync.errors import ConfigError, ManifestError
from wsync.session.messages import Fault
from wsync.spec.manifest import (
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    SourceRankManifest,
    merge_source,
)
from wsync.spec.serde import digest_of


@dataclasses.dataclass(eq=False)
class Client:
    """One connected rank, as the coordinator sees it.

    Attributes:
        manifest: what an engine rank needs; None until it was described and accepted.
        asleep: it did not answer in the last round and has not entered prepare since: rounds go on without it.
        poisoned: its live memory is of no known version.
    """

    uid: bytes
    name: str
    role: str
    rank: int
    replica: str
    world_size: int
    info: RankInfo
    last_heard: float
    manifest: SinkRankManifest | None = None
    asleep: bool = False
    poisoned: bool = False


class ReplicaStatus(msgspec.Struct, frozen=True):
    """One replica, as trainer rank 0 sees it now.

    Attributes:
        world_size: ranks that it should have.
        joined: its ranks that are there and fit the trainer.
        complete: all of them are.
        asleep: some missed a version and have not entered prepare since: publishes go on without the replica.
        poisoned: the live memory of some is of no known version, until its next commit.
        refused: by rank, why it was turned away.
    """

    world_size: int
    joined: tuple[int, ...]
    complete: bool
    asleep: bool
    poisoned: bool
    refused: dict[int, str]


class Membership:
    """The tables of clients. Pure bookkeeping: no sockets."""

    def __init__(self, num_sources: int) -> None:
        self.num_sources = num_sources
        self.clients: dict[bytes, Client] = {}
        self.source_parts: dict[int, SourceRankManifest] = {}
        self.source: SourceManifest | None = None
        self.names_digest = ""
        self.refusals: dict[str, Fault] = {}
        self.handshake_failures = 0

    # ---- trainer ranks

    @property
    def sources(self) -> dict[int, Client]:
        """Trainer ranks by rank."""
        return {c.rank: c for c in self.clients.values() if c.role == "source"}

    def add_source(self, uid: bytes, manifest: SourceRankManifest) -> Client:
        """A trainer rank joined.

        Raises:
            ManifestError: a rank or world size that does not fit the others.
        """
        rank, world_size = manifest.rank, manifest.world_size
        if world_size != self.num_sources:
            raise ManifestError(f"trainer rank {rank} says world size {world_size}, rank 0 says {self.num_sources}")
        if self.source is not None:
            raise ManifestError(
                f"pid {manifest.info.pid} on {manifest.info.host} joins as rank {rank} of a trainer that is complete"
            )
        if rank in self.source_parts:
            other = self.source_parts[rank].info
            raise ManifestError(
                f"two processes join as trainer rank {rank}: pid {other.pid} on {other.host} "
                f"and pid {manifest.info.pid} on {manifest.info.host}"
            )
        client = Client(uid, f"trainer/{rank}", "source", rank, "", world_size, manifest.info, time.monotonic())
        self.clients[uid] = client
        self.source_parts[rank] = manifest
        return client

    def merge_sources(self) -> SourceManifest | None:
        """The source manifest, once all trainer ranks are there.

        Raises:
            ManifestError: the ranks describe different models.
        """
        if self.source is None and len(self.source_parts) == self.num_sources:
            self.source = merge_source(list(self.source_parts.values()))
            self.names_digest = digest_of(self.source.tensors)
        return self.source

    # ---- engine ranks

    def add_sink(self, client: Client) -> Client | None:
        """An engine rank asked for the name table. Returns the client that it replaces (a restarted process), if any.

        Raises:
            ConfigError: its rank or world size does not fit the replica's other ranks.
        """
        if not 0 <= client.rank < client.world_size:
            raise ConfigError(
                f"replica {client.replica!r}: rank {client.rank} is not below world size {client.world_size}"
            )
        replaced = None
        for other in self.sinks(client.replica):
            if other.rank == client.rank:
                replaced = other
            elif other.world_size != client.world_size:
                raise ConfigError(
                    f"replica {client.replica!r}: rank {client.rank} says world size {client.world_size}, "
                    f"rank {other.rank} says {other.world_size}"
                )
        if replaced is not None:
            del self.clients[replaced.uid]
        self.clients[client.uid] = client
        self.refusals.pop(client.name, None)
        return replaced

    def sinks(self, replica: str | None = None) -> list[Client]:
        """Engine ranks, of one replica or of all, by replica and rank."""
        found = [c for c in self.clients.values() if c.role == "sink" and replica in (None, c.replica)]
        return sorted(found, key=lambda c: (c.replica, c.rank))

    def complete_replicas(self) -> dict[str, list[Client]]:
        """Replicas all of whose ranks are described and awake, by name."""
        replicas: dict[str, list[Client]] = {}
        for client in self.sinks():
            if client.manifest is not None and not client.asleep:
                replicas.setdefault(client.replica, []).append(client)
        return {name: ranks for name, ranks in sorted(replicas.items()) if len(ranks) == ranks[0].world_size}

    def status(self) -> dict[str, ReplicaStatus]:
        """Every replica of which a rank came, also one that was turned away."""
        refused: dict[str, dict[int, str]] = {}
        for client_name, fault in sorted(self.refusals.items()):
            replica, _, rank = client_name.rpartition("/")
            refused.setdefault(replica, {})[int(rank)] = f"{fault.name}: {fault.message}"
        found = {}
        for name in sorted({c.replica for c in self.sinks()} | refused.keys()):
            ranks = self.sinks(name)
            joined = tuple(c.rank for c in ranks if c.manifest is not None)
            # A rank that was turned away left no world size; its replica has at least the ranks that came.
            world_size = ranks[0].world_size if ranks else max(refused[name]) + 1
            found[name] = ReplicaStatus(
                world_size,
                joined,
                len(joined) == world_size,
                any(c.asleep for c in ranks),
                any(c.poisoned for c in ranks),
                refused.get(name, {}),
            )
        return found

    def describe_missing(self) -> str:
        """One phrase on what the replicas lack, for messages."""
        parts = []
        replicas = {c.replica: c.world_size for c in self.sinks()}
        for name, world_size in sorted(replicas.items()):
            there = [c.rank for c in self.sinks(name) if c.manifest is not None]
            missing = sorted(set(range(world_size)) - set(there))
            if missing:
                parts.append(f"replica {name!r} lacks ranks {missing} of {world_size}")
            asleep = [c.rank for c in self.sinks(name) if c.asleep]
            if asleep:
                parts.append(f"replica {name!r}: ranks {asleep} have not entered prepare since they missed a version")
        parts += [f"{name} was refused: {fault.message}" for name, fault in sorted(self.refusals.items())]
        if self.handshake_failures:
            parts.append(f"{self.handshake_failures} connections with another key were turned away")
        return "; ".join(parts) or "no engine rank has joined"


def sink_manifest(replicas: dict[str, list[Client]]) -> SinkManifest:
    """The manifest of these replicas, in the plan's order of sinks."""
    return SinkManifest(tuple(c.manifest for ranks in replicas.values() for c in ranks if c.manifest is not None))
