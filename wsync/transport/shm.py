"""Transport between processes of one host: staging in POSIX shared memory, read in place.

Nothing is left in /dev/shm once every end has connected: the last one to open a segment removes its name. What an owner
that was killed before that leaves behind is removed by the next `prepare` of the same user.
"""

from __future__ import annotations

import secrets
from typing import Any

from wsync.native import load_extension
from wsync.transport.offers import Offer
from wsync.transport.segment_end import Segment
from wsync.transport.segments import SegmentSink, SegmentSource


class ShmSegments:
    """Makes and opens segments in /dev/shm. Thread rule: one thread per end."""

    name = "shm"

    def create(self, offer: Offer) -> tuple[Segment, str]:
        native = load_extension()
        native.shm_sweep_stale()
        name = f"wsync-stage-{secrets.token_hex(16)}"
        return native.ShmSegment.create(name, _geometry(native, offer)), name

    def open(self, offer: Offer) -> Segment:
        native = load_extension()
        segment: Segment = native.ShmSegment.open(offer.segment, _geometry(native, offer))
        return segment


def _geometry(native: Any, offer: Offer) -> object:
    return native.ShmGeometry(
        rank=offer.rank,
        num_openers=offer.num_openers,
        num_buckets=len(offer.buckets),
        bucket_bytes=offer.bucket_bytes,
        exchange_elements=offer.exchange_elements,
        plan_token=offer.plan_token,
    )


def shm_source() -> SegmentSource:
    """A trainer rank's end for sinks on the same host."""
    return SegmentSource(ShmSegments())


def shm_sink() -> SegmentSink:
    """An engine rank's end for sources on the same host."""
    return SegmentSink(ShmSegments())
