"""How pieces fill buckets: one behind the other, aligned; what does not fit is cut where the bucket ends."""

from __future__ import annotations

from wsync.plan.geometry import cut_leading
from wsync.plan.types import ALIGNMENT, MAX_BUCKETS, MAX_WIRE_BYTES
from wsync.spec.box import Box

Placed = tuple[bool, Box, int, int]
"""Whether a new bucket begins, then a piece's box, offset and bytes."""


def aligned(nbytes: int) -> int:
    """Rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def place(box: Box, elem_bytes: int, step: tuple[int, int], offset: int, size: int) -> tuple[list[Placed], int]:
    """Where the parts of a box go in buckets of ``size`` bytes of which ``offset`` are taken.

    Args:
        box: to place.
        elem_bytes: of one element on the wire.
        step: cuts in the last two dimensions (rows, columns) fall on multiples of these.
        offset: in the open bucket.
        size: of a bucket.

    Returns:
        The parts, and the offset behind the last one.
    """
    out: list[Placed] = []
    todo = [box]
    opens = False
    while todo:
        part = todo.pop()
        nbytes = part.num_elements * elem_bytes
        if offset + nbytes <= size:
            out.append((opens, part, offset, nbytes))
            offset, opens = aligned(offset + nbytes), False
            continue
        cut = cut_leading(part, elem_bytes, size - offset, size, step)
        if cut is None:
            todo.append(part)
            offset, opens = 0, True
        else:
            todo += (*reversed(cut[1]), cut[0])
    return out, offset


def bucket_room(nbytes: int, bucket_bytes: int) -> int:
    """Numbers that are kept for a flow's buckets: never fewer than it has.

    A bucket is closed where the next step of a piece does not fit, and that step begins the next bucket: two that
    follow each other hold more than one bucket's bytes. Cutting adds less than ALIGNMENT a cut, of which a bucket has
    few; the factor of 4 is for buckets of little more than ALIGNMENT.
    """
    return 4 * -(-nbytes // bucket_bytes) + 4


def max_buckets(bucket_bytes: int) -> int:
    """How many numbers of buckets a plan may use."""
    return min(MAX_BUCKETS, MAX_WIRE_BYTES // bucket_bytes)


class BucketCounter:
    """Counts the buckets of flows without listing their pieces. Equal situations are worked out once.

    Args:
        size: of a bucket.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: dict[tuple[Box, int, tuple[int, int], int], tuple[int, int]] = {}

    def add(self, at: tuple[int, int], box: Box, elem_bytes: int, step: tuple[int, int], count: int) -> tuple[int, int]:
        """Where ``count`` equal boxes end that begin at ``at``: both (buckets closed before, offset)."""
        closed, offset = at
        nbytes = box.num_elements * elem_bytes
        while count:
            if offset + nbytes <= self.size:
                fit = min(count, (self.size - offset - nbytes) // aligned(nbytes) + 1) if nbytes else count
                offset += fit * aligned(nbytes)
                count -= fit
                continue
            more, offset = self._across(box, elem_bytes, step, offset)
            closed += more
            count -= 1
        return closed, offset

    def _across(self, box: Box, elem_bytes: int, step: tuple[int, int], offset: int) -> tuple[int, int]:
        key = (box, elem_bytes, step, offset)
        found = self._known.get(key)
        if found is None:
            placed, end = place(box, elem_bytes, step, offset, self.size)
            found = self._known[key] = sum(p[0] for p in placed), end
        return found
