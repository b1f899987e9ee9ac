"""Checks of what a caller hands to a transport: slices, versions, vectors. All raise before anything moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wsync.errors import ConfigError, StateError
from wsync.plan.types import ALIGNMENT, SOURCE, Bucket, SinkSlice, SourceSlice


def check_source_slice(slice_: SourceSlice, num_sources: int) -> None:
    """Refuse a slice that no plan would make.

    Raises:
        ConfigError: naming the first thing that is wrong, with both values.
    """
    if not 0 <= slice_.rank < num_sources:
        raise ConfigError(f"the slice is for trainer rank {slice_.rank} of {num_sources}")
    _check_buckets(slice_.bucket_bytes, slice_.buckets)
    for bucket in slice_.buckets:
        if bucket.src_rank != slice_.rank:
            raise ConfigError(f"bucket {bucket.bucket_idx} belongs to rank {bucket.src_rank}, not rank {slice_.rank}")


def check_sink_slice(slice_: SinkSlice) -> None:
    """Refuse a slice that no plan would make.

    Raises:
        ConfigError: naming the first thing that is wrong, with both values.
    """
    _check_buckets(slice_.bucket_bytes, slice_.buckets)
    for bucket in slice_.buckets:
        if slice_.sink_idx not in bucket.sinks:
            raise ConfigError(
                f"bucket {bucket.bucket_idx} is for sinks {list(bucket.sinks)}, not for sink {slice_.sink_idx}"
            )


def _check_buckets(bucket_bytes: int, buckets: Sequence[Bucket]) -> None:
    if bucket_bytes <= 0 or bucket_bytes % ALIGNMENT:
        raise ConfigError(f"bucket_bytes is {bucket_bytes} and must be a positive multiple of {ALIGNMENT}")
    seen: set[int] = set()
    for bucket in buckets:
        if not 0 < bucket.used_bytes <= bucket_bytes:
            raise ConfigError(f"bucket {bucket.bucket_idx} uses {bucket.used_bytes} of {bucket_bytes} bytes")
        if bucket.bucket_idx in seen:
            raise ConfigError(f"bucket {bucket.bucket_idx} is listed twice")
        seen.add(bucket.bucket_idx)


def check_hops(bucket: Bucket) -> None:
    """Refuse a delivery tree that does not reach every sink of the bucket exactly once.

    Raises:
        ConfigError: naming the bucket and the hop or sink.
    """
    reached = {SOURCE}
    for src, dst in bucket.hops:
        if src not in reached or dst in reached or dst not in bucket.sinks:
            raise ConfigError(
                f"bucket {bucket.bucket_idx} has hop {src} -> {dst} after {sorted(reached)} had it,"
                f" for sinks {list(bucket.sinks)}"
            )
        reached.add(dst)
    missing = sorted(set(bucket.sinks) - reached)
    if missing:
        raise ConfigError(f"bucket {bucket.bucket_idx} is needed by sinks {missing} and no hop delivers it there")


def check_next_version(label: str, last: int, version: int) -> None:
    """Versions given to a transport only grow; a failed one burns its number.

    Raises:
        StateError: naming both versions.
    """
    if version <= last:
        raise StateError(f"{label} was given version {version} after version {last}; versions must increase")


def check_exchange(plan: SourceSlice, vector: npt.NDArray[np.float32], exchanged: bool) -> None:
    """Refuse a vector that the plan does not describe.

    Raises:
        ConfigError: wrong dtype, shape or layout.
        StateError: exchanged twice in one version.
    """
    if vector.dtype != np.float32 or vector.shape != (plan.amax_elements,) or not vector.flags.c_contiguous:
        raise ConfigError(
            f"the exchanged vector is {vector.dtype} {list(vector.shape)} and the plan says float32"
            f" [{plan.amax_elements}], contiguous"
        )
    if exchanged:
        raise StateError(f"rank {plan.rank} exchanged maxima twice in one version")


def check_send(plan: SourceSlice, version: int, sent: set[int], bucket_pos: int, num_bytes: int | None) -> int:
    """Refuse to send what cannot be sent. Returns the bytes of the message.

    Raises:
        StateError: before `begin`, or twice in one version.
        ConfigError: there is no such bucket, or it has fewer bytes.
    """
    if not 0 <= bucket_pos < len(plan.buckets):
        raise ConfigError(f"rank {plan.rank} sends bucket position {bucket_pos} of {len(plan.buckets)}")
    if version == 0:
        raise StateError(f"rank {plan.rank} sends bucket position {bucket_pos} before any version began")
    if bucket_pos in sent:
        raise StateError(f"rank {plan.rank} sends bucket position {bucket_pos} twice in version {version}")
    used_bytes = plan.buckets[bucket_pos].used_bytes
    num_bytes = used_bytes if num_bytes is None else num_bytes
    if not 0 < num_bytes <= used_bytes:
        raise ConfigError(f"rank {plan.rank} sends {num_bytes} of {used_bytes} bytes of bucket position {bucket_pos}")
    return num_bytes
