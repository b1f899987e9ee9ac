"""How an engine rank becomes a member: it asks for the trainer's names, records its loader, describes itself.

A rank that the coordinator does not know (it restarted, or gave this rank up while it was silent) joins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from wsync.errors import PlanMismatchError
from wsync.plan.program import StorageMemory
from wsync.session.channel import Channel
from wsync.session.laststep import LastSteps
from wsync.session.messages import Accepted, Failed, Fault, NameTable, Rejoin, SinkDescribed, SinkJoin
from wsync.spec.manifest import SinkRankManifest, TensorSpec
from wsync.spec.serde import digest_of

_REJOIN_S = 1.0

Describe = Callable[[tuple[TensorSpec, ...]], tuple[SinkRankManifest, Sequence[StorageMemory], LastSteps]]
"""Records the engine's loader against the trainer's name table: what it needs, where that lies, what is left to do."""


class Joining:
    """What an engine rank told the coordinator, and which trainer it told.

    Args:
        channel: to the coordinator.
        describe: records the engine's loader.
        join: this rank.

    Attributes:
        manifest, storages, steps: what ``describe`` returned last; None and empty before.
        incarnation: of the trainer.
    """

    def __init__(self, channel: Channel, describe: Describe, join: SinkJoin) -> None:
        self.manifest: SinkRankManifest | None = None
        self.storages: Sequence[StorageMemory] = ()
        self.steps = LastSteps()
        self.incarnation = 0
        self._channel = channel
        self._describe = describe
        self._join = join
        self._names_digest = ""
        self._last_join_s = 0.0

    def join(self, deadline: float) -> None:
        """Join, and wait until the coordinator accepted what this rank described.

        Raises:
            WsyncError: the engine does not fit the trainer, or the deadline passed.
        """
        self._send_join()
        while True:
            message = self._channel.recv(deadline, "the trainer's name table")
            if isinstance(message, NameTable):
                self.take_names(message)
            elif isinstance(message, Rejoin):
                self.join_again(message)
            elif isinstance(message, Accepted):
                return

    def _send_join(self) -> None:
        self._last_join_s = time.monotonic()
        self._channel.send(self._join)

    def join_again(self, message: Rejoin) -> bool:
        """Answer the coordinator that does not know this rank. Returns whether it is another trainer's."""
        is_new = message.incarnation != self.incarnation
        if is_new or time.monotonic() > self._last_join_s + _REJOIN_S:
            self._send_join()
        self.incarnation = message.incarnation
        return is_new

    def take_names(self, message: NameTable) -> None:
        """Record once; the same names again (a restarted trainer) need no new recording."""
        if message.names_digest != self._names_digest:
            if digest_of(message.tensors) != message.names_digest:
                raise PlanMismatchError(
                    f"the name table has digest {digest_of(message.tensors)}, {message.names_digest} was announced"
                )
            try:
                self.manifest, self.storages, self.steps = self._describe(message.tensors)
            except BaseException as e:
                self._channel.send(Failed(0, 0, Fault.of(e)))  # the trainer must learn why this engine does not fit
                raise
            self._names_digest = message.names_digest
        self.incarnation = message.incarnation
        if self.manifest is not None:
            self._channel.send(SinkDescribed(message.names_digest, self.manifest))
