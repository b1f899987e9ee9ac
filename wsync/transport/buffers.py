"""Staging memory of one process: anonymous, zeroed and faulted in once, never moved."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Staging:
    """``num_buckets`` buckets, ``stride_bytes`` apart, page aligned.

    Views of it keep the memory alive; the object itself only forgets it on `close`.
    """

    def __init__(self, num_buckets: int, stride_bytes: int) -> None:
        self.num_buckets = num_buckets
        self.stride_bytes = stride_bytes
        total = max(num_buckets * stride_bytes, 1)
        memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)
        self._bytes[:: mmap.PAGESIZE] = 0  # a page fault during a sync would cost more than the copy

    def address(self, bucket_pos: int) -> int:
        """Address of a bucket's first byte."""
        return int(self._bytes.ctypes.data) + bucket_pos * self.stride_bytes

    def view(self, bucket_pos: int, num_bytes: int, offset: int = 0) -> Bytes:
        """``num_bytes`` bytes from the bucket's byte ``offset`` on as ``[num_bytes]`` u8, without a copy."""
        begin = bucket_pos * self.stride_bytes + offset
        return self._bytes[begin : begin + num_bytes]

    def close(self) -> None:
        """Forget the memory; it goes with its last view."""
        self._bytes = np.empty(0, dtype=np.uint8)
