"""Messages between ranks over a gloo process group of our own: posted ahead, awaited by helper threads.

What shaped it (gloo over TCP, as torch ships it):

- ``work.wait(timeout)`` closes every connection of the group when it times out, and ``is_completed()`` stays false for
  point-to-point work until somebody waited. So a helper thread per peer and direction waits without a timeout, and
  callers wait on a condition variable, with deadlines of their own that harm nobody.
- A posted receive cannot be taken back, and a later receive with the same tag would get the message meant for it. So a
  receive that a failed version left behind stays posted: it is simply the next message of that stream, and the header
  says which version it belongs to.
- When a connection breaks, gloo fails the posted receives, but sends that the kernel had taken a part of stay pending
  for ever. So whoever sends to a peer also keeps a receive posted that the peer never serves: it fails when the peer
  is gone, and only then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from wsync.errors import PeerLostError, StateError
from wsync.transport.buffers import Bytes
from wsync.transport.waiting import Patience

HEADER_BYTES = 32
"""A message begins with the version, the digest, the bytes that follow and zero, u64 each, little endian."""

_FOREVER = timedelta(days=365)
_CLOSE_S = 2.0
_WATCH_TAG = (1 << 31) - 2


class Message:
    """Fixed memory for one stream of messages: header, then content, of which the first bytes may travel alone.

    Attributes:
        transfer: the last one posted from or into this memory, or None.
    """

    def __init__(self, memory: Bytes) -> None:
        """``memory`` holds header and content; it is neither copied nor resized."""
        self.tensor = torch.from_numpy(memory)
        self.capacity = int(memory.size) - HEADER_BYTES
        self._header = memory[:HEADER_BYTES].view("<u8")
        self.transfer: Transfer | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody reads or writes this memory."""
        return self.transfer is None or self.transfer.finished

    @property
    def version(self) -> int:
        return int(self._header[0])

    @property
    def digest(self) -> int:
        return int(self._header[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the content; what arrived may say more than `capacity`."""
        return int(self._header[2])

    @property
    def outgoing(self) -> torch.Tensor:
        """What travels."""
        return self.tensor[: HEADER_BYTES + self.num_bytes]

    def seal(self, version: int, digest: int, num_bytes: int | None = None) -> None:
        """Write the header; None means all of the content."""
        self._header[0] = np.uint64(version)
        self._header[1] = np.uint64(digest)
        self._header[2] = np.uint64(self.capacity if num_bytes is None else num_bytes)


class Transfer:
    """One message on its way.

    Attributes:
        finished: it arrived, was handed to the network, or failed.
        error: what gloo said, or an empty string.
    """

    __slots__ = ("error", "finished", "inbox", "key", "peer", "work")

    def __init__(self, peer: int, key: int, inbox: deque[Transfer] | None) -> None:
        self.peer = peer
        self.key = key
        self.inbox = inbox
        self.work: Any = None
        self.finished = False
        self.error = ""


class _Lane:
    """Waits for the transfers with one peer in one direction, in order of posting."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self._mesh = mesh
        self._queue: deque[Transfer | None] = deque()
        self._posted = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, transfer: Transfer | None) -> None:
        """None ends the thread."""
        self._queue.append(transfer)
        self._posted.release()

    def _run(self) -> None:
        while True:
            self._posted.acquire()
            transfer = self._queue.popleft()
            if transfer is None:
                return
            try:
                transfer.work.wait(_FOREVER)
            except RuntimeError as error:
                transfer.error = _first_line(error)
            self._mesh.finish(transfer)


class Mesh:
    """The ends of one group, by index: trainer ranks first, then sinks.

    Calls come from one thread, `close` from any.
    """

    def __init__(self, group: Any, store: Any, labels: Sequence[str]) -> None:
        self._group: Any = group
        self._store: Any = store  # rank 0's is the server
        self._labels = labels
        self._lanes: dict[tuple[int, str, str], _Lane] = {}  # peer, direction, name
        self._changed = threading.Condition()
        self._pending: set[Transfer] = set()
        self._closed = False
        self._watches: dict[int, tuple[Transfer, Message]] = {}

    def watch(self, peer: int) -> None:
        """Have `gone` notice when this end's connection with ``peer`` breaks."""
        if peer not in self._watches:
            message = Message(np.zeros(HEADER_BYTES, dtype=np.uint8))
            self._watches[peer] = (self.post_receive(peer, _WATCH_TAG, message, lane="watch"), message)

    def gone(self, peer: int) -> str:
        """Why a watched peer is gone; empty while it is not."""
        watched = self._watches.get(peer)
        return watched[0].error if watched is not None and watched[0].finished else ""

    def post_send(self, peer: int, tag: int, message: Message, lane: str = "") -> Transfer:
        """Start sending; the message's memory must not change until it is idle.

        Args:
            lane: messages of one lane are seen to finish in order of posting; those that may wait for long while
                others come and go need a lane of their own.

        Raises:
            StateError: the mesh is closed.
        """
        return self._post(("out", lane), peer, tag, message, None)

    def post_receive(
        self, peer: int, tag: int, message: Message, inbox: deque[Transfer] | None = None, lane: str = ""
    ) -> Transfer:
        """Start receiving; the finished transfer (its ``key`` is the tag) is appended to ``inbox``. See `post_send`."""
        return self._post(("in", lane), peer, tag, message, inbox)

    def _post(
        self, way: tuple[str, str], peer: int, tag: int, message: Message, inbox: deque[Transfer] | None
    ) -> Transfer:
        transfer = Transfer(peer, tag, inbox)
        with self._changed:
            group = self._group
            if self._closed or group is None:
                raise StateError("the transport was closed")
            self._pending.add(transfer)
        if way[0] == "in":
            message.transfer = transfer
        start = group.send if way[0] == "out" else group.recv
        try:
            transfer.work = start([message.outgoing if way[0] == "out" else message.tensor], peer, tag)
        except RuntimeError as error:
            transfer.error = _first_line(error)
            self.finish(transfer)
            return transfer
        with self._changed:
            lane = self._lanes.get((peer, way[0], way[1]))
            if lane is None:
                lane = self._lanes[peer, way[0], way[1]] = _Lane(self, f"wsync-gloo-{way[0]}{way[1]}-{peer}")
            closed = self._closed
        lane.submit(transfer)
        if closed:  # while this was posted: nobody else ends the lane
            lane.submit(None)
        return transfer

    def finish(self, transfer: Transfer) -> None:
        """Called by lanes."""
        with self._changed:
            self._pending.discard(transfer)
            transfer.work = None
            transfer.finished = True
            if transfer.inbox is not None:
                transfer.inbox.append(transfer)
            self._changed.notify_all()

    def wait(self, ready: Callable[[], bool], patience: Patience, waited_for: Callable[[], str]) -> None:
        """Wait until ``ready``, which is called whenever a transfer finished. It may raise.

        Raises:
            StateError: the mesh was closed meanwhile.
        """
        while True:
            with self._changed:
                for attempt in range(2):
                    if self._closed:
                        raise StateError(f"the transport was closed: {waited_for()}")
                    if ready():
                        return
                    if attempt == 0:
                        self._changed.wait(patience.slice_s)
            patience.check(waited_for)

    def wait_for(self, transfer: Transfer, patience: Patience, waited_for: Callable[[], str]) -> None:
        """Wait until ``transfer`` finished. Raises `PeerLostError` if it failed."""
        self.wait(lambda: transfer.finished, patience, waited_for)
        self.check(transfer, waited_for())

    def check(self, transfer: Transfer, what: str) -> None:
        """Raise `PeerLostError` if the transfer failed."""
        if transfer.error:
            raise PeerLostError(f"{self._labels[transfer.peer]} was lost: {what} ({transfer.error})")

    def label(self, peer: int) -> str:
        """How messages call this end."""
        return self._labels[peer]

    def close(self) -> None:
        """End every wait of this group and give it back. Never waits for a peer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            works = [transfer.work for transfer in self._pending if transfer.work is not None]
        for work in works:
            # A wait that times out closes the group's connections, which ends all other waits.
            try:
                work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                break
        with self._changed:
            lanes = list(self._lanes.values())
            self._lanes.clear()
        for lane in lanes:
            lane.submit(None)
        ends = time.monotonic() + _CLOSE_S
        for lane in lanes:  # one with a send that gloo never ends (see above) stays behind, asleep
            lane.thread.join(timeout=max(0.0, ends - time.monotonic()))
        works.clear()
        self._group = None
        self._store = None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(". This is typically")[0] if str(error) else type(error).__name__
