"""How sinks pass buckets on to one another, and how they say that they will not."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from wsync.errors import TransportError, WsyncError
from wsync.plan.types import Bucket
from wsync.transport.gloo_mesh import HEADER_BYTES, Mesh, Message, Transfer

_NOTE_TAG = (1 << 31) - 1  # above those of buckets and of exchanged maxima
_NOTE_LANE = "note"


class Relays:
    """One sink's relays: buckets to its children, and notes between relays and children.

    A relay that stops receiving a version early (its replica was aborted) sends each child that still misses buckets of
    it a note, a header without content, so that the child fails at once and by name. What no note can tell: a relay
    that lives and never begins to receive the version. Its children wait until their deadline or until they are
    cancelled. In the same way a child that never takes what was relayed to it keeps its relay from receiving that
    bucket's next version.
    """

    def __init__(
        self, mesh: Mesh, sink_idx: int, num_sources: int, buckets: Sequence[Bucket], messages: Sequence[Message]
    ) -> None:
        """``messages``: memory of each bucket."""
        self._mesh = mesh
        self._num_sources = num_sources
        self._buckets = buckets
        self._messages = messages
        self._children = [tuple(dst for src, dst in bucket.hops if src == sink_idx) for bucket in buckets]
        self._under_way: dict[int, list[Transfer]] = {}
        self._passed: set[int] = set()
        parents = {src for bucket in buckets for src, dst in bucket.hops if dst == sink_idx and src >= 0}
        self._notes_in = {num_sources + sink: _note() for sink in sorted(parents)}
        self._notes_out = {sink: _note() for sink in sorted({c for children in self._children for c in children})}
        self._note_inbox: deque[Transfer] = deque()
        for child in self._notes_out:
            mesh.watch(num_sources + child)

    def begin(self) -> None:
        """A version starts: listen for notes."""
        self._passed.clear()
        for peer, note in self._notes_in.items():
            if note.transfer is None:
                self._listen(peer, note)

    def is_free(self, pos: int) -> bool:
        """Whether nobody reads the bucket any more on behalf of another sink."""
        return all(transfer.finished or self._mesh.gone(transfer.peer) for transfer in self._under_way.get(pos, ()))

    def all_free(self) -> bool:
        """Whether nothing is under way."""
        return all(self.is_free(pos) for pos in self._under_way)

    def forget(self, pos: int) -> None:
        """The bucket's memory is written again."""
        self._under_way.pop(pos, None)

    def pass_on(self, pos: int) -> None:
        """Send the bucket to the children. A lost child is its own replica's failure, not this one's."""
        self._passed.add(pos)
        if self._children[pos]:
            idx, message = self._buckets[pos].bucket_idx, self._messages[pos]
            self._under_way[pos] = [
                self._mesh.post_send(self._num_sources + child, idx, message) for child in self._children[pos]
            ]

    def give_up(self, version: int) -> None:
        """Tell the children that still miss buckets of ``version`` that they will not come from here."""
        unfed = {child for pos, children in enumerate(self._children) if pos not in self._passed for child in children}
        with contextlib.suppress(WsyncError):  # closed: the children find the connection gone
            for child in sorted(unfed):
                note = self._notes_out[child]
                note.seal(version, 0)  # one that the child has not taken yet now speaks of this version
                if note.idle:
                    peer = self._num_sources + child
                    note.transfer = self._mesh.post_send(peer, _NOTE_TAG, note, lane=_NOTE_LANE)

    @property
    def has_notes(self) -> bool:
        """Whether `check_notes` has something to look at."""
        return bool(self._note_inbox)

    def check_notes(self, version: int, progress: str) -> None:
        """Raise if a relay gave up ``version``.

        Raises:
            TransportError: naming the relay.
        """
        while self._note_inbox:
            transfer = self._note_inbox.popleft()
            note = self._notes_in[transfer.peer]
            note.transfer = None
            if transfer.error:  # the receives of buckets tell whether it is missed
                continue
            given_up = note.version  # before the next note may overwrite it
            self._listen(transfer.peer, note)
            if given_up >= version:
                label = self._mesh.label(transfer.peer)
                raise TransportError(f"{label} gave up version {given_up} and relays no more of it: {progress}")

    def _listen(self, peer: int, note: Message) -> None:
        self._mesh.post_receive(peer, _NOTE_TAG, note, self._note_inbox, lane=_NOTE_LANE)


def _note() -> Message:
    return Message(np.zeros(HEADER_BYTES, dtype=np.uint8))
