"""Which sets of islands to look at: those whose bytes over whose rate may be the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from wsync.plan.cuts.tally import Flux
from wsync.plan.nodes import Nodes
from wsync.plan.route.balance import balance

MAX_UNIONS = 16


def island_rates(nodes: Nodes) -> list[float]:
    """GB/s of all NICs of each island."""
    rates = [0.0] * len(nodes.island_names)
    for nic in nodes.nics:
        rates[nodes.island[nic.node]] += nic.rate_gbps
    return rates


def bits_of(mask: int) -> list[int]:
    """The islands of a bit set."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def leaving(flux: Sequence[Flux], inside: int, relay: bool) -> int:
    """Bytes that must leave the islands of ``inside``: once with relays, else once for each island that needs them."""
    total = 0
    for held, needed, nbytes in flux:
        if not held & ~inside:
            outside = needed & ~inside
            if outside:
                total += nbytes if relay else nbytes * outside.bit_count()
    return total


def entering(flux: Sequence[Flux], inside: int) -> int:
    """Bytes that must enter the islands of ``inside``."""
    return sum(nbytes for held, needed, nbytes in flux if needed & inside and not held & inside)


def worst_senders(flux: Sequence[Flux], rates: Sequence[float], relay: bool) -> int:
    """The islands that are last to finish if what leaves is spread as evenly as it can be.

    The set on which such a balance puts its highest level can hand nothing to others, so it is the tightest cut.
    """
    work: dict[tuple[int, ...], int] = {}
    for held, needed, nbytes in flux:
        outside = needed & ~held
        if outside:
            islands = tuple(i for i in bits_of(held) if rates[i])
            count = 1 if relay else outside.bit_count()
            if islands:
                work[islands] = work.get(islands, 0) + nbytes * count
    load = [0] * len(rates)
    speed = [max(1, round(r * 1e9)) for r in rates]
    balance([(n, k) for k, n in work.items()], load, speed)
    levels = [n / s for n, s in zip(load, speed, strict=True)]
    top = max(levels, default=0.0)
    return sum(1 << i for i, x in enumerate(levels) if top and x >= top * 0.999)


def grown(start: int, parts: Iterable[int], value: Callable[[int], float]) -> int:
    """Join ``start`` with one of ``parts`` after another for as long as that makes the cut slower."""
    best, seconds = start, value(start)
    pool = list(dict.fromkeys(parts))
    for _ in range(MAX_UNIONS):
        joined = max(((value(best | p), -(best | p)) for p in pool if best | p != best), default=None)
        if joined is None or joined[0] <= seconds:
            return best
        seconds, best = joined[0], -joined[1]
    return best
