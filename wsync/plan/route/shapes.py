"""How often each island of a family passes on each of its bytes: the degrees of its delivery trees.

Source: McNaughton's wrap-around rule (Scheduling with deadlines and loss functions, 1959). Amounts that islands pass on
are laid into rows as long as the family's bytes, one after another, each going on in the next row where it reaches the
end of one. Any numbers of children with sum n and at least one child of the sender make a tree of n islands.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

GOLDEN = 0.6180339887498949
"""Families that are too small to be cut begin at positions spread by the golden ratio."""
EDGE = 1e-7
"""Parts of a family smaller than this are left out."""
MAX_WIDTH = 6
"""Islands pass a byte on to at most this many others by choice."""


class Part(NamedTuple):
    """A part of a family's bytes whose trees are equal.

    Attributes:
        end: as a part of one.
        source: children of the sender.
        islands: children of each island.
    """

    end: float
    source: int
    islands: tuple[int, ...]


def find_parts(source: float, relays: Sequence[float], width: int) -> list[Part]:
    """Cut a family where its trees have to change.

    Args:
        source: copies that the sender makes on average, at least 1.
        relays: copies that each island makes on average; with ``source`` they add up to the number of islands.
        width: an island that passes a byte on makes this many copies of it where it can.
    """
    count = len(relays)
    whole = min(count, int(source + EDGE))
    height = count - whole
    if not height:
        return [Part(1.0, count, (0,) * count)]
    rows = [width] * (height // width) + ([height % width] if height % width else [])
    amounts = [max(0.0, source - whole), *relays]
    scale = height / sum(amounts)
    bars = _lay([a * scale for a in amounts], rows)
    edges = sorted({0.0, 1.0, *(x for _, _, *ends in bars for x in ends)})
    out = []
    for start, end in pairwise(edges):
        if end - start < EDGE:
            continue
        degrees = [0] * (count + 1)
        for who, degree, first, last in bars:
            if first <= (start + end) / 2 < last:
                degrees[who] += degree
        if sum(degrees) == height:
            out.append(Part(end, whole + degrees[0], tuple(degrees[1:])))
    return [*out[:-1], out[-1]._replace(end=1.0)]


def _lay(amounts: Sequence[float], rows: Sequence[int]) -> list[tuple[int, int, float, float]]:
    """Bars (who, copies, first, last) that fill every row from 0 to 1."""
    bars = []
    row, at = 0, 0.0
    for who, amount in enumerate(amounts):
        left = amount
        while row < len(rows) and left > EDGE:
            take = min(1.0 - at, left / rows[row])
            if 1.0 - at - take < EDGE:
                take = 1.0 - at
            bars.append((who, rows[row], at, at + take))
            left -= take * rows[row]
            at += take
            if at >= 1.0:
                row, at = row + 1, 0.0
    if row < len(rows) and bars:
        who, degree, first, _ = bars[-1]
        bars[-1] = (who, degree, first, 1.0)
    return bars


def sampled(parts: Sequence[Part], count: int, phase: float) -> list[Part]:
    """At most ``count`` parts, of equal length, each with the trees of its middle; ``phase`` turns them."""
    if len(parts) <= count:
        return list(parts)
    out, idx = [], 0
    for i in range(count):
        at = ((i + 0.5) / count + phase) % 1.0
        idx = next(k for k, p in enumerate(parts) if at < p.end)
        out.append(parts[idx]._replace(end=(i + 1) / count))
    return out


def depth_of(num_islands: int, source: int, width: int) -> int:
    """Hops behind the first one in the deepest branch, if ``width`` copies are made wherever one is."""
    inner = -(-(num_islands - source) // width)
    depth, level, left = 0, source, num_islands
    while left > level:
        left -= level
        nodes = min(level, inner)
        inner -= nodes
        level = max(1, nodes * width)
        depth += 1
    return depth


def best_width(num_islands: int, source: int, hop_s: float, bucket_s: float, enough_s: float) -> int:
    """How many copies an island should make of a byte that it passes on: one (chains) where they fill soon enough.

    Args:
        num_islands: of the family.
        source: copies that the sender makes.
        hop_s: alpha of a hop.
        bucket_s: of one copy of a bucket.
        enough_s: filling that nobody minds.
    """
    best, fill_s = 1, depth_of(num_islands, source, 1) * (hop_s + bucket_s)
    for width in range(2, MAX_WIDTH + 1):
        wide_s = depth_of(num_islands, source, width) * (hop_s + width * bucket_s)
        if fill_s > enough_s and wide_s < fill_s:
            best, fill_s = width, wide_s
    return best


def tree_of(part: Part, turn: int) -> list[tuple[int, int]]:
    """The tree of one part as (from, to) positions of islands, -1 for the sender.

    Those with most children come first, each at the shallowest place that is free.

    Args:
        part: with the degrees.
        turn: which island comes first among equals; in a single chain it is the one after the chain's last.
    """
    ends = [i for i, n in enumerate(part.islands) if not n]
    turn = ends[0] + 1 if len(ends) == 1 else turn
    count = len(part.islands)
    order = sorted(range(count), key=lambda i: (-part.islands[i], (i - turn) % count))
    slots = [-1] * part.source
    hops = []
    for taken, island in enumerate(order):
        hops.append((slots[taken], island))
        slots += [island] * part.islands[island]
    return hops
