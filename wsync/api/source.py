"""`Source`: a trainer rank's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wsync.adapters.trainers import describe
from wsync.adapters.trainers.declared import Declared
from wsync.api.common import check_store, close_at_exit, rank_and_world, share_of_cores, whole_number
from wsync.errors import ConfigError, StateError
from wsync.plan.types import PlanOptions
from wsync.session.auth import derive_keys, load_secret
from wsync.session.channel import PEER_TIMEOUT_S, Channel
from wsync.session.clock import local_info
from wsync.session.coordinator import Coordinator
from wsync.session.membership import ReplicaStatus
from wsync.session.publication import Publication
from wsync.session.source import SourceSession
from wsync.spec.cluster import Cluster
from wsync.transport import TRANSPORTS, choose_transport, open_source

if TYPE_CHECKING:
    import torch

_MAX_DELTA_BUCKET_BYTES = 1 << 32
_WRITE_CHECKS = ("counts", "digest")


class Source:
    """One trainer rank's weights. Construct it on every trainer rank; the call returns when all have.

    Args:
        model_or_tensors: an ``nn.Module`` (plain or with DTensor parameters of any placement), or a dict from
            checkpoint name to tensor or array (torch, NumPy, anything with ``__dlpack__``), on the CPU. Plain tensors
            count as replicated. Tied weights are sent once. The memory is read in place at every publish.
        store: ``tcp://host:port``; trainer rank 0 binds it, everybody else connects. Port 0 (one trainer rank only)
            picks a free one: read `store`.
        key_file: file with the job's secret (`new_key_file`); None takes it from ``WSYNC_KEY``.
        rank, world_size: of the trainer; None takes them from torch.distributed, or 0 and 1.
        transport: ``"auto"`` (shared memory where all ranks share one, else gloo),
            ``"shm"``, ``"gloo"`` or ``"loopback"``.
        name_map: from the model's name of a tensor to its checkpoint name.
        recipe: for engines that declare no recipes of their own: one for every float parameter of two or more
            dimensions, or a dict by checkpoint name, or a function of `TensorSpec` (None for the default).
        cluster: rates of the machines, for the plan; None assumes equal nodes.
        options: of the planner.
        num_threads: of the pack kernels; None divides this process's cores among the trainer ranks of this host.
        join_deadline_s: seconds to wait for all trainer ranks.
        peer_timeout_s: silence after which a rank counts as lost.
        write_check: how a write before *released* is noticed, which would mix two versions: ``"counts"`` asks torch how
            often each tensor was written in place (free; does not see arrays of others, writes through ``.data``, and
            ``foreach`` or ``fused`` optimizers on DTensors); ``"digest"`` also packs everything a second time and
            compares digests (sees all of these; adds about the packing's time to the trainer's stall).
        delta: send only what changed in the encoded bytes since the last publish, where every engine rank holds that.
            Costs memory: each trainer rank keeps what it packed and one bucket more, each engine rank the same of what
            it receives. The same on all trainer ranks.
        delta_anchor_every: every so many publishes one is sent whole all the same; rank 0's counts.

    Raises:
        ConfigError: bad arguments; `ManifestError` where ranks describe different models. Raised on every rank.
        ConnectError: the store cannot be bound or reached, or the key is refused.
        DeadlineError: not all trainer ranks came in time.

    Threads: calls are for one thread. Packing runs on threads of its own without the GIL.
    """

    def __init__(
        self,
        model_or_tensors: torch.nn.Module | Mapping[str, Any],
        *,
        store: str,
        key_file: str | os.PathLike[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        transport: str = "auto",
        name_map: Callable[[str], str] | None = None,
        recipe: Declared | None = None,
        cluster: Cluster | None = None,
        options: PlanOptions | None = None,
        num_threads: int | None = None,
        join_deadline_s: float = 60.0,
        peer_timeout_s: float = PEER_TIMEOUT_S,
        write_check: str = "counts",
        delta: bool = False,
        delta_anchor_every: int = 50,
    ) -> None:
        if whole_number(delta_anchor_every, "delta_anchor_every") < 1:
            raise ConfigError(f"delta_anchor_every must be at least 1, got {delta_anchor_every}")
        anchor_every = delta_anchor_every if delta else 0
        bucket_bytes = options.bucket_bytes if options is not None else None
        if delta and bucket_bytes is not None and bucket_bytes >= _MAX_DELTA_BUCKET_BYTES:
            raise ConfigError(
                f"delta takes buckets below {_MAX_DELTA_BUCKET_BYTES} bytes, bucket_bytes is {bucket_bytes}"
            )
        if write_check not in _WRITE_CHECKS:
            raise ConfigError(f"write_check must be one of {_WRITE_CHECKS}, got {write_check!r}")
        self.rank, self.world_size = rank_and_world(rank, world_size)
        check_store(store)
        if transport not in ("auto", *TRANSPORTS):
            raise ConfigError(f"unknown transport {transport!r}; known: auto, {', '.join(TRANSPORTS)}")
        keys = derive_keys(load_secret(key_file))
        if store.endswith(":0") and self.world_size > 1:
            raise ConfigError(f"store {store!r} has port 0, which works for 1 trainer rank only, not {self.world_size}")
        info = local_info()
        self._description = describe(
            model_or_tensors,
            rank=self.rank,
            world_size=self.world_size,
            info=info,
            name_map=name_map,
            recipe=recipe,
        )
        self._coordinator: Coordinator | None = None
        self._channel: Channel | None = None
        self._session: SourceSession | None = None
        self._closed = False
        close_at_exit(self)
        try:
            if self.rank == 0:
                self._coordinator = Coordinator(
                    store,
                    keys,
                    self.world_size,
                    transport=transport,
                    choose_transport=choose_transport,
                    cluster=cluster,
                    options=options,
                    peer_timeout_s=peer_timeout_s,
                    anchor_every=anchor_every,
                )
                store = self._coordinator.store
            self.store = store
            self._channel = Channel(store, keys, f"trainer/{self.rank}", peer_timeout_s=peer_timeout_s)
            self._session = SourceSession(
                self._channel,
                self._description.manifest,
                self._description.memory,
                open_source,
                transport=transport,
                num_threads=share_of_cores(num_threads, int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))),
                join_deadline_s=join_deadline_s,
                keepalive=self._description,
                second_read=write_check == "digest",
                delta=delta,
            )
        except BaseException:
            self.close()
            raise

    def publish(self, version: int, *, min_replicas: int | None = None, deadline_s: float = 60.0) -> Publication:
        """Publish the current weights as ``version``. Call it on every trainer rank with the same arguments.

        Returns at once. The weights must not change before `Publication.wait_released`; a write that is noticed
        (see ``write_check``) ends the publish with a `StateError`, and engines keep what they serve. A publish that is
        not yet committed everywhere is superseded: replicas that had not decided keep the version that they serve.

        Args:
            version: larger than the last one of this Source; one that nobody committed may be tried again.
            min_replicas: replicas that must commit, and that are waited for before anything moves; None means 1.
            deadline_s: seconds for the whole publish, on every rank.

        Raises:
            StateError: the Source is closed, the version does not increase, the previous publish is not released, or
                a tensor's memory moved since the Source was made.
            ConfigError: bad arguments.
        """
        session = self._session
        if session is None:
            raise StateError(f"publish(version={version}) on a closed Source")
        version = whole_number(version, "version")
        if not 0 <= version < 2**63:
            raise ConfigError(f"version must be in [0, 2**63), got {version}")
        last = session.last_version
        if last is not None and version <= last:
            raise StateError(
                f"version must increase: got {version}, the last was {last}",
                hint="a new Source begins a new incarnation and may start anywhere",
            )
        if min_replicas is not None and whole_number(min_replicas, "min_replicas") < 1:
            raise ConfigError(f"min_replicas must be at least 1, got {min_replicas}")
        description = self._description
        description.check_addresses()
        counts = description.write_counts()
        return session.publish(version, min_replicas or 1, deadline_s, lambda: description.check_unwritten(counts))

    def replicas(self) -> dict[str, ReplicaStatus]:
        """Which engine replicas are joined now, by name: complete, asleep, poisoned, turned away. Any thread.

        Raises:
            StateError: this is not trainer rank 0, which alone knows, or the Source is closed.
        """
        if self._closed:
            raise StateError("replicas() on a closed Source")
        if self._coordinator is None:
            raise StateError(f"replicas() on trainer rank {self.rank}: only rank 0 knows who joined")
        return self._coordinator.replicas()

    def close(self) -> None:
        """Leave and free staging. Engines keep what they serve. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._session.close()
            self._session = None
        elif self._channel is not None:
            self._channel.close()
        if self._coordinator is not None:
            self._coordinator.close()

    def __enter__(self) -> Source:
        if self._closed:
            raise StateError("this Source is closed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
