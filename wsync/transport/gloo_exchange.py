"""Elementwise maximum over the trainer ranks by recursive doubling, over the same messages as the buckets.

A gloo allreduce is not used: one that a failed version left behind on some ranks would pair with the next version's.
Messages carry their version, so a late one is recognised and dropped.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsync.errors import TransportError
from wsync.transport.buffers import Staging
from wsync.transport.gloo_mesh import HEADER_BYTES, Mesh, Message
from wsync.transport.waiting import Patience

_TAG_BASE = 1 << 30  # bucket indices stay below


def partners(rank: int, num_ranks: int) -> list[tuple[int, str]]:
    """What a rank does, step by step: (partner, "send" | "receive" | "both").

    Ranks beyond the largest power of two fold into the others first and get the result last.
    """
    core = 1 << (num_ranks.bit_length() - 1)
    if rank >= core:
        return [(rank - core, "send"), (rank - core, "receive")]
    steps = [(rank ^ (1 << k), "both") for k in range(core.bit_length() - 1)]
    if rank + core < num_ranks:
        return [(rank + core, "receive"), *steps, (rank + core, "send")]
    return steps


class Exchange:
    """One rank's part. Its memory is allocated once: the vector, and one for each message that comes."""

    def __init__(self, mesh: Mesh, rank: int, num_ranks: int, num_elements: int) -> None:
        self._mesh = mesh
        self._steps = partners(rank, num_ranks)
        self._label = mesh.label(rank)
        num_bytes = num_elements * 4 + HEADER_BYTES
        stride = -(-num_bytes // 256) * 256
        self._staging = Staging(len(self._steps) + 1, stride)
        self._content = [
            self._staging.view(i, num_elements * 4, HEADER_BYTES).view("<f4") for i in range(len(self._steps) + 1)
        ]
        self._messages = [Message(self._staging.view(i, num_bytes)) for i in range(len(self._steps) + 1)]

    def run(self, vector: npt.NDArray[np.float32], version: int, patience: Patience) -> None:
        """Replace ``vector`` by the maximum over all ranks (NaN wins)."""
        for step, (_, way) in enumerate(self._steps):
            if way != "send" and self._messages[step].transfer is None:
                self._post(step)
        mine, own = self._content[-1], self._messages[-1]
        self._drain(patience, version)
        mine[:] = vector
        for step, (partner, way) in enumerate(self._steps):
            if way != "receive":
                own.seal(version, 0)
                own.transfer = self._mesh.post_send(partner, self._tag(step, partner), own)
            if way != "send":
                self._receive(step, version, patience)
            self._drain(patience, version)
            if way != "send":
                # After the result came back from the core, it is the maximum already: taking it again changes nothing.
                np.maximum(mine, self._content[step], out=mine)
        vector[:] = mine

    def _tag(self, step: int, partner: int) -> int:
        """The same number at both ends of a message."""
        steps_to = [i for i, (other, _) in enumerate(self._steps) if other == partner]
        return _TAG_BASE + steps_to.index(step)

    def _post(self, step: int) -> None:
        partner = self._steps[step][0]
        self._mesh.post_receive(partner, self._tag(step, partner), self._messages[step])

    def _drain(self, patience: Patience, version: int) -> None:
        """Wait until the own vector may be written again."""
        transfer = self._messages[-1].transfer
        if transfer is None:
            return
        what = f"{self._label} sent its maxima to {self._mesh.label(transfer.peer)} in version {version}"
        self._mesh.wait_for(transfer, patience, lambda: what)

    def _receive(self, step: int, version: int, patience: Patience) -> None:
        message = self._messages[step]
        partner = self._mesh.label(self._steps[step][0])
        what = f"{self._label} waited for the exchanged maxima of {partner} in version {version}"
        while True:
            transfer = message.transfer
            if transfer is None:
                self._post(step)
                continue
            try:
                self._mesh.wait_for(transfer, patience, lambda: what)
            finally:
                if transfer.finished:
                    message.transfer = None
            if message.version == version:
                return
            if message.version > version:
                raise TransportError(f"{partner} went on to version {message.version}: {what}")
