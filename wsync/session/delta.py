"""Deltas of a publish: what a trainer rank keeps and encodes, what an engine rank keeps and applies.

A publish is a delta only if the coordinator saw every rank of the epoch hold its base, whole and verified. Each bucket
of it travels as a code where that is smaller than the bucket, and as it is otherwise. The base is named by its publish
number and by each bucket's digest; whoever holds another one refuses. Codes only ever change the engine rank's copy of
the wire bytes; live memory is written as always, after the digest of the whole bucket was right.
"""

from __future__ import annotations

import numpy as np

from wsync import kernels
from wsync.errors import StateError, WireError
from wsync.plan.types import Bucket, SinkSlice, SourceSlice
from wsync.session.messages import Sent
from wsync.spec.dtypes import itemsize
from wsync.transport import Staged
from wsync.transport.buffers import Staging


class _Held:
    """The wire bytes of one version: one bucket after the other, and what names them."""

    def __init__(self, slice_: SourceSlice | SinkSlice, name: str) -> None:
        self.seq = 0
        self.digests = [0] * len(slice_.buckets)
        self._name = name
        self._memory = Staging(len(slice_.buckets), slice_.bucket_bytes)

    def address(self, pos: int) -> int:
        return self._memory.address(pos)

    def check(self, base_seq: int) -> None:
        if base_seq and base_seq != self.seq:
            held = f"publish {self.seq}" if self.seq else "no whole version"
            raise StateError(f"{self._name} got a delta against publish {base_seq} and holds {held}")


class DeltaSender:
    """A trainer rank's side of one epoch.

    Memory: what this rank packs (its buckets) once more, and one bucket. `begin`; for each bucket pack to `scratch`,
    then `fill`; `finish`. After an error the version counts for nothing.

    Args:
        slice_: of this rank.
        num_threads: of the encoder.
    """

    def __init__(self, slice_: SourceSlice, num_threads: int) -> None:
        self._buckets = slice_.buckets
        self._num_threads = num_threads
        self._held = _Held(slice_, f"trainer rank {slice_.rank}")
        self._scratch = Staging(1, slice_.bucket_bytes)
        self._cuts = [_cuts(bucket, slice_) for bucket in slice_.buckets]
        self._gaps = [_gaps(bucket) for bucket in slice_.buckets]
        self._seq = 0
        self._base_seq = 0
        self._counts = Sent()

    def begin(self, seq: int, base_seq: int) -> None:
        """Publish ``seq`` comes, as a delta against ``base_seq``, or whole where that is 0.

        Raises:
            StateError: this rank does not hold the base.
        """
        self._held.check(base_seq)
        self._held.seq = 0
        self._seq, self._base_seq, self._counts = seq, base_seq, Sent()

    def scratch(self, pos: int) -> int:
        """Address to pack the bucket to; what lies between its pieces is zero."""
        for begin, end in self._gaps[pos]:
            self._scratch.view(0, end)[begin:] = 0
        return self._scratch.address(0)

    def fill(self, pos: int, out: int, digest: int) -> int:
        """Write what shall travel of the packed bucket to ``out``. Returns its bytes."""
        fresh, base = self._scratch.address(0), self._held.address(pos)
        used_bytes = self._buckets[pos].used_bytes
        num_bytes, changed, compared = 0, 0, 0
        if self._base_seq:
            num_bytes, changed, compared = kernels.delta_encode(
                fresh, base, out, self._cuts[pos], self._base_seq, self._held.digests[pos], self._num_threads
            )
        else:
            kernels.memcpy(base, fresh, used_bytes, self._num_threads)
        if not num_bytes:
            kernels.memcpy(out, fresh, used_bytes, self._num_threads)
        self._held.digests[pos] = digest
        self._counts += Sent(
            dense_buckets=int(not num_bytes),
            delta_buckets=int(bool(num_bytes)),
            dense_bytes=0 if num_bytes else used_bytes,
            delta_bytes=num_bytes,
            changed_elements=changed,
            compared_elements=compared,
        )
        return num_bytes or used_bytes

    def finish(self) -> Sent:
        """All buckets are filled: this version is the next one's base."""
        self._held.seq = self._seq
        return self._counts


class DeltaKeeper:
    """An engine rank's side of one epoch: a copy of the wire bytes that no trainer rank writes.

    Memory: the rank's buckets once more, and one bucket.

    Args:
        slice_: of this rank.
        num_threads: of the decoder.
        name: of this rank, for messages.
    """

    def __init__(self, slice_: SinkSlice, num_threads: int, name: str) -> None:
        self._buckets = slice_.buckets
        self._num_threads = num_threads
        self._held = _Held(slice_, name)
        self._code = np.zeros(slice_.bucket_bytes, np.uint8)
        self._base_seq = 0

    @property
    def seq(self) -> int:
        """The publish that is held, whole and verified, or 0."""
        return self._held.seq

    def begin(self, base_seq: int) -> None:
        """A version comes, as a delta against ``base_seq``, or whole where that is 0.

        Raises:
            StateError: this rank does not hold the base.
        """
        self._held.check(base_seq)
        self._held.seq, self._base_seq = 0, base_seq

    def take(self, staged: Staged) -> Staged:
        """The whole bucket, in this rank's own memory, which the digest is to be compared with.

        Raises:
            WireError: the code is malformed, or of another base.
        """
        pos = staged.bucket_pos
        bucket, address = self._buckets[pos], self._held.address(pos)
        if staged.num_bytes == bucket.used_bytes:
            kernels.memcpy(address, staged.address, bucket.used_bytes, self._num_threads)
        elif not self._base_seq:
            raise WireError(f"bucket {bucket.bucket_idx} came as {staged.num_bytes} bytes in a publish without a base")
        else:
            # Where memory is shared a trainer rank may write it at any time, also while it is decoded.
            code = self._code.ctypes.data
            kernels.memcpy(code, staged.address, staged.num_bytes, 1)
            kernels.delta_apply(
                address,
                bucket.used_bytes,
                code,
                staged.num_bytes,
                self._base_seq,
                self._held.digests[pos],
                self._num_threads,
            )
        self._held.digests[pos] = staged.digest
        return Staged(pos, address, staged.digest, bucket.used_bytes)

    def finish(self, seq: int) -> None:
        """Everything came and is verified: ``seq`` is what this rank holds."""
        self._held.seq = seq

    def forget(self) -> None:
        """What is held is in doubt."""
        self._held.seq = 0


def _cuts(bucket: Bucket, slice_: SourceSlice) -> kernels.Cuts:
    """Stripes of a bucket: neighbours whose elements are alike share them. A gap goes with the piece before it."""
    sizes = [min(itemsize(slice_.parts[piece.part_idx].dtype), 2) for piece in bucket.pieces]
    ends = [piece.offset for piece in bucket.pieces[1:]] + [bucket.used_bytes]
    spans: list[tuple[int, int]] = []
    at = 0
    for size, end in zip(sizes, ends, strict=True):
        if spans and spans[-1][1] == size:
            spans[-1] = (spans[-1][0] + end - at, size)
        else:
            spans.append((end - at, size))
        at = end
    return kernels.delta_cuts(spans)


def _gaps(bucket: Bucket) -> list[tuple[int, int]]:
    """Bytes of a bucket that belong to no piece."""
    ends = [piece.offset for piece in bucket.pieces[1:]] + [bucket.used_bytes]
    begins = [piece.offset + piece.nbytes for piece in bucket.pieces]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]
