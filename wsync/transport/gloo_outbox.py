"""A source's messages on their way to sinks: what fails or stalls costs the sink it was for, and nobody else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from wsync.transport.gloo_mesh import Mesh, Message, Transfer
from wsync.transport.waiting import Patience


class Outbox:
    """Transfers by sink, in order of posting, and the sinks that were lost."""

    def __init__(self, mesh: Mesh, label: str, num_sources: int, sinks: Iterable[int], lost: dict[int, str]) -> None:
        """``sinks``: whom messages go to. ``lost``: filled with sink index -> reason."""
        self._mesh = mesh
        self._label = label
        self._num_sources = num_sources
        self._lost = lost
        self._queues: dict[int, deque[tuple[int, int, Transfer]]] = {}  # version, bytes, transfer
        self._version = 0
        self._num_bytes = 0
        self._bytes_done = 0
        self._sinks = sorted(set(sinks))
        for sink in self._sinks:
            mesh.watch(num_sources + sink)

    def begin(self, version: int) -> None:
        """Messages posted from now on are of ``version``."""
        self._version, self._num_bytes, self._bytes_done = version, 0, 0

    def post(self, sink: int, tag: int, message: Message) -> None:
        """Start sending, unless the sink was lost; the memory must not change until `wait` returned."""
        if sink in self._lost:
            return
        transfer = self._mesh.post_send(self._num_sources + sink, tag, message)
        self._num_bytes += message.num_bytes
        self._queues.setdefault(sink, deque()).append((self._version, message.num_bytes, transfer))
        if transfer.finished and transfer.error:
            self._lose(sink, f"sending failed: {transfer.error}")

    def reap(self) -> bool:
        """Look at what finished. Returns whether something did."""
        moved = False
        for sink in self._sinks:
            if sink not in self._lost and (why := self._mesh.gone(self._num_sources + sink)):
                self._lose(sink, f"it died or closed its transport: {why}")
                moved = True
        for sink, queue in list(self._queues.items()):
            while queue and queue[0][2].finished:
                version, num_bytes, transfer = queue.popleft()
                moved = True
                if transfer.error:
                    self._lose(sink, f"it died or closed its transport: {transfer.error}")
                    break
                if version == self._version:
                    self._bytes_done += num_bytes
            if not queue:
                self._queues.pop(sink, None)
        return moved

    def wait(self, patience: Patience) -> None:
        """Wait until nothing is under way to a sink that is not lost."""
        self._mesh.wait(self._is_empty, patience, self.progress)

    def drain(self, patience: Patience, stall_s: float) -> None:
        """Like `wait`, but sinks that take nothing for ``stall_s`` seconds while all wait for them are lost."""
        moved_at = time.monotonic()

        def ready() -> bool:
            nonlocal moved_at
            now = time.monotonic()
            if self.reap():
                moved_at = now
            if now - moved_at >= stall_s:
                for sink, queue in list(self._queues.items()):
                    self._lose(sink, f"it took nothing of version {queue[0][0]} for {stall_s:.2f} s as the next began")
            return not self._queues

        self._mesh.wait(ready, patience, self.progress)

    def progress(self) -> str:
        """What messages say about the state of sending."""
        waiting = ", ".join(self._mesh.label(self._num_sources + sink) for sink in sorted(self._queues))
        return (
            f"{self._label} had {self._bytes_done} of {self._num_bytes} bytes of version {self._version} sent"
            f" and waited for {waiting or 'nobody'}"
        )

    def _is_empty(self) -> bool:
        self.reap()
        return not self._queues

    def _lose(self, sink: int, why: str) -> None:
        self._lost.setdefault(sink, f"{self._label} lost {self._mesh.label(self._num_sources + sink)}: {why}")
        self._queues.pop(sink, None)
