"""One epoch of an engine rank: its slice, its transport, its installer; and how a version is staged in it."""

from __future__ import annotations

import time
from collections.abc import Callable

from wsync.errors import DigestError, PlanMismatchError, StateError, WireError, WsyncError
from wsync.plan import CompactSlice, expand_sink
from wsync.plan.program import compile_sink
from wsync.session.clock import Stopwatch
from wsync.session.delta import DeltaKeeper
from wsync.session.install import Installer, WriteConstants
from wsync.session.joining import Joining
from wsync.session.messages import Begin, Connect, Offer, Ready, Setup, Stamp
from wsync.spec.serde import decode
from wsync.transport import SinkEnd, Staged
from wsync.transport.base import Cancelled


class Staging:
    """Compiles the slice that a `Setup` brings and opens the transport.

    Args:
        message: that begins the epoch.
        joined: what this rank described.
        open_transport: makes this rank's end of the transport of that name.
        num_threads: of the digest and unpack kernels.
        name: of this rank, for messages.
        write_constants: see `Installer`.

    Attributes:
        epoch: its number.
        installer: of its program.
        end: of its transport.
        num_bytes: that a version brings.

    Raises:
        WsyncError: the slice does not fit what this rank described.
    """

    def __init__(
        self,
        message: Setup,
        joined: Joining,
        open_transport: Callable[[str], SinkEnd],
        *,
        num_threads: int,
        name: str,
        write_constants: WriteConstants,
    ) -> None:
        if joined.manifest is None:
            raise StateError(f"{name}: Setup came before the name table")
        self.epoch = message.epoch
        self._name = name
        self._slice = expand_sink(decode(message.slice_, CompactSlice))
        if self._slice.plan_digest != message.plan_digest:
            raise PlanMismatchError(f"a slice of plan {self._slice.plan_digest} came with plan {message.plan_digest}")
        self._keeper = DeltaKeeper(self._slice, num_threads, name) if message.delta else None
        self.num_bytes = sum(piece.nbytes for bucket in self._slice.buckets for piece in bucket.pieces)
        scratch = [repack.storages for repack in joined.steps.repacks]
        program = compile_sink(self._slice, joined.manifest, joined.storages, scratch)
        self.end = open_transport(message.transport)
        self.installer = Installer(
            program, self.end, joined.steps, num_threads=num_threads, name=name, write_constants=write_constants
        )

    def offer(self) -> Offer:
        """Allocate staging."""
        return Offer(self.epoch, self._slice.plan_digest, self.end.prepare(self._slice))

    def connect(self, message: Connect, deadline: float, cancelled: Cancelled) -> Ready:
        """Reach the other ends.

        Raises:
            StateError: the message is of another epoch.
            TransportError: an end was not reached.
        """
        if message.epoch != self.epoch:
            raise StateError(f"{self._name}: Connect of epoch {message.epoch} came in epoch {self.epoch}")
        self.end.connect(list(message.source_offers), list(message.sink_offers), deadline, cancelled)
        return Ready(message.epoch, self._slice.plan_digest)

    def stage(self, begin: Begin, deadline: float, watch: Stopwatch, cancelled: Cancelled) -> None:
        """Receive a version, verify it, and prepare the repacks. Touches nothing that the engine reads.

        Raises:
            DigestError: bytes differ from what was published.
            WireError: a delta is malformed or of another base.
            WsyncError: it did not arrive, or the engine could not prepare it.
        """
        if begin.plan_digest != self._slice.plan_digest:
            raise PlanMismatchError(
                f"{self._name} holds plan {self._slice.plan_digest}, the publish is of {begin.plan_digest}"
            )
        wrong: list[str] = []
        refused: WsyncError | None = None
        verify_s = 0.0
        self.installer.begin()
        try:
            self._begin_delta(begin)
        except StateError as e:
            refused = e
        with watch.phase("receive"):
            for staged in self.end.receive(begin.seq, deadline, cancelled):
                if refused is not None:
                    continue  # taken all the same: what is not taken would count against this rank's transport
                started = time.monotonic()
                try:
                    if found := self.installer.verify(self._whole(staged)):
                        wrong.append(found)
                except WireError as e:
                    refused = e
                verify_s += time.monotonic() - started
        now = time.monotonic()
        watch.stamps.append(Stamp("verify", now - verify_s, now))
        if refused is not None:
            raise refused
        if wrong:
            raise DigestError(f"{self._name}: {len(wrong)} buckets differ from what was published; {wrong[0]}")
        if self._keeper is not None:
            self._keeper.finish(begin.seq)
        with watch.phase("repack"):
            self.installer.stage(begin.seq, cancelled)

    def _begin_delta(self, begin: Begin) -> None:
        if self._keeper is not None:
            self._keeper.begin(begin.base_seq)
        elif begin.base_seq:
            raise StateError(f"{self._name} got a delta against publish {begin.base_seq} and keeps no version")

    def _whole(self, staged: Staged) -> Staged:
        if self._keeper is not None:
            return self._keeper.take(staged)
        bucket = self._slice.buckets[staged.bucket_pos]
        if staged.num_bytes != bucket.used_bytes:
            raise WireError(f"bucket {bucket.bucket_idx} has {bucket.used_bytes} bytes, {staged.num_bytes} came")
        return staged

    def distrust(self) -> None:
        """What is staged is in doubt: the next version must come whole."""
        if self._keeper is not None:
            self._keeper.forget()

    def close(self) -> None:
        """Forget what is prepared and leave the transport. May be called twice."""
        self.installer.discard()
        self.end.close()
