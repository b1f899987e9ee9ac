"""The trainer side for programs that use vLLM's ``WeightTransferTrainerFactory``. Others make a `Fleet` themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from wsync.errors import ConfigError, StateError
from wsync.integrations.vllm.together import agree

if TYPE_CHECKING:
    from wsync.api import Source
    from wsync.integrations.vllm.fleet import Fleet
    from wsync.integrations.vllm.reports import FleetReport
    from wsync.integrations.vllm.sources import HostCopy


@dataclass(kw_only=True)
class WsyncTrainerInitInfo:
    """vLLM's ``TrainerInitInfo`` for this backend, by its members: the factory reads ``backend``.

    Attributes:
        rank, world_size: of this trainer process.
        store: ``tcp://host:port``; trainer rank 0 binds it.
        key_file: the job's key; None takes it from ``WSYNC_KEY``.
        server_store, server_key_file: the same as the servers see them; None where they see the same.
        names, pause, caches, recipes, options: as for `Fleet`.
        min_replicas: as for `wsync.Source.publish`.
        first_version: of the first `WsyncTrainer.send_weights`; each next one is larger by 1.
        transport: as for `wsync.Source`.
        deadline_s: seconds to join, and of each `WsyncTrainer.send_weights`.
    """

    backend: ClassVar[str] = "wsync"

    rank: int
    store: str
    world_size: int = 1
    key_file: str | os.PathLike[str] | None = None
    server_store: str | None = None
    server_key_file: str | os.PathLike[str] | None = None
    names: Sequence[str] | None = None
    pause: str = "keep"
    caches: str | None = None
    recipes: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    min_replicas: int | None = None
    first_version: int = 1
    transport: str = "auto"
    deadline_s: float = 60.0

    @property
    def is_sender(self) -> bool:
        """Whether this rank talks to the servers."""
        return self.rank == 0


class WsyncTrainer:
    """vLLM's ``TrainerWeightTransferEngine``, by its members. Made by `trainer_init`, on every trainer rank.

    Args:
        client: the servers' client, or several in a list. vLLM's own clients do not pause a server, so the caller does
            that around `send_weights`; give `HTTPServer` or a URL, and the server is paused for the commit alone.
        source: the weights. A module, a mapping of tensors or vLLM's ``ModuleSource`` is read in place, whatever its
            sharding. Any other ``WeightSource`` is iterated at each `send_weights` into host memory of this side.
        is_sender: whether this rank talks to the servers.
    """

    init_info_cls = WsyncTrainerInitInfo

    def __init__(self, *, client: Any, source: Any = None, is_sender: bool = True) -> None:
        self.client = client
        self.source = source
        self.is_sender = is_sender
        self.version: int | None = None
        self._info: WsyncTrainerInitInfo | None = None
        self._copy: HostCopy | None = None
        self._published: Source | None = None
        self._fleet: Fleet | None = None

    @classmethod
    def trainer_init(
        cls, init_info: WsyncTrainerInitInfo, *, client: Any, source: Any = None, config: object = None
    ) -> WsyncTrainer:
        """Join: all trainer ranks first, then the servers.

        Args:
            init_info: of this rank.
            client, source: as for the class.
            config: what older versions of vLLM pass besides; not used.

        Raises:
            WsyncError: as `wsync.Source` and `Fleet`.
        """
        if source is None:
            raise ConfigError("the backend 'wsync' sends whole models: it needs a source, got None")
        trainer = cls(client=client, source=source, is_sender=init_info.is_sender)
        trainer._info = init_info
        try:
            trainer._join(init_info)
        except BaseException:
            trainer.shutdown()
            raise
        return trainer

    def _join(self, info: WsyncTrainerInitInfo) -> None:
        from wsync.integrations.vllm.sources import HostCopy, read_in_place

        weights = read_in_place(self.source)
        if weights is not None:
            return self._publish_from(weights, info.rank, info.world_size)
        copy = self._copy = HostCopy(self.source, info.rank, info.world_size)

        def begin() -> None:
            if copy.tensors is not None:
                self._publish_from(copy.tensors, copy.rank, copy.world_size)

        if copy.world_size == info.world_size:
            return begin()
        # Rank 0 publishes everything. Without it the others would wait for ever in the source's collectives.
        agree(info.rank, info.world_size, begin, "trainer rank 0 could not join its servers; its own error says why")

    def _publish_from(self, weights: Any, rank: int, world_size: int) -> None:
        from wsync.api import Source
        from wsync.integrations.vllm.fleet import Fleet

        info = self._init_info()
        self._published = Source(
            weights,
            store=info.store,
            key_file=info.key_file,
            rank=rank,
            world_size=world_size,
            transport=info.transport,
            join_deadline_s=info.deadline_s,
        )
        self._fleet = Fleet(
            self._published,
            self.client if isinstance(self.client, (list, tuple)) else [self.client],
            pause=info.pause,
            caches=info.caches,
            names=info.names,
            key_file=info.server_key_file or info.key_file,
            store=info.server_store,
            recipes=info.recipes,
            options=info.options,
            deadline_s=info.deadline_s,
        )

    def send_weights(self) -> FleetReport | None:
        """Publish the weights as the next version, and return when every server serves it or is known not to.

        Call it on every trainer rank. The weights may change when it returns. Returns None on a rank that only takes
        part in the source's collectives.

        Raises:
            WsyncError: as `FleetPublication.wait_committed`; the next call may work.
            StateError: it is shut down.
        """
        info = self._init_info()
        if self._copy is not None:
            why = "the weights could not be copied on another trainer rank; its own error says why"
            agree(info.rank, info.world_size, self._copy.fill, why)
        self.version = info.first_version if self.version is None else self.version + 1
        if self._fleet is None:
            return None
        publication = self._fleet.publish(self.version, min_replicas=info.min_replicas, deadline_s=info.deadline_s)
        return publication.wait_committed()

    def _init_info(self) -> WsyncTrainerInitInfo:
        if self._info is None:
            raise StateError("send_weights() before trainer_init() or after shutdown()")
        return self._info

    def shutdown(self) -> None:
        """Let the servers go; they serve on with what they have. May be called twice."""
        fleet, self._fleet = self._fleet, None
        source, self._published = self._published, None
        self._info = None
        with contextlib.ExitStack() as stack:
            if source is not None:
                stack.callback(source.close)
            if fleet is not None:
                stack.callback(fleet.close)
