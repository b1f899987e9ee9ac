"""Cuts through shared links.

Bytes go only from nodes that hold them to nodes that need them, and on from there. Demand that has both in a few zones
alone therefore has links of its own to cross, even if a way through another zone would be wider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from wsync.plan.cuts.search import bits_of
from wsync.plan.cuts.tally import Flux
from wsync.plan.nodes import Nodes

MAX_HOLDERS = 8
"""Sets of holders that are looked at in each zone."""
MAX_CROWDED = 16
MAX_FEW = 4
"""So many sets of so few zones are looked at for themselves."""
MAX_ZONES = 10
"""Of up to so many zones every division into two is looked at; of more, each zone and each side of a link."""


def link_cuts(flux: Sequence[Flux], nodes: Nodes) -> Iterator[tuple[str, int, float]]:
    """(name, bytes, GB/s) of every division of the zones that links separate completely."""
    links = nodes.cluster.links
    if not links or nodes.zones.count < 2:
        return
    every = frozenset(range(nodes.zones.count))
    for among in dict.fromkeys([every, *_crowded(flux, nodes)]):
        zones = _islands(nodes, among)
        mine = [x for x in flux if not (x.held | x.needed) & ~zones]
        for inside in _divisions(nodes, among):
            cover = _cover(nodes, inside, among)
            if cover is None:
                continue
            mask = _islands(nodes, inside)
            nbytes = sum(w for held, needed, w in mine if not held & ~mask and needed & ~mask)
            names = [f"link {links[i // 2].name} from {'+'.join(_side(nodes, i))}" for i in cover]
            yield " and ".join(names), nbytes, sum(links[i // 2].rate_gbps for i in cover)


def guarded_cuts(
    flux: Sequence[Flux], nodes: Nodes, rates: Sequence[float], names: Callable[[int], str]
) -> Iterator[tuple[str, int, float]]:
    """(name, bytes, GB/s) of what enters a zone's other islands from its holders and over its links.

    Args:
        flux: by islands.
        nodes: of the job.
        rates: GB/s of each island.
        names: of a set of islands.
    """
    if not nodes.cluster.links or nodes.zones.count < 2:
        return
    zones = frozenset(range(nodes.zones.count))
    for zone in sorted(zones):
        cover = _cover(nodes, zones - {zone}, zones)
        if cover is None:
            continue
        mask = _islands(nodes, frozenset([zone]))
        for holders in _heavy(flux, mask):
            inside = mask & ~holders
            nbytes = sum(w for held, needed, w in flux if needed & inside and not held & inside)
            rate = sum(nodes.cluster.links[i // 2].rate_gbps for i in cover) + sum(rates[i] for i in bits_of(holders))
            into = " and ".join(
                f"link {nodes.cluster.links[i // 2].name} from {'+'.join(_side(nodes, i))}" for i in cover
            )
            yield f"egress of {names(holders)} with {into}", nbytes, rate


def _heavy(flux: Sequence[Flux], mask: int) -> list[int]:
    """Which islands of a zone hold the most of what its others need."""
    total: dict[int, int] = {}
    for held, needed, nbytes in flux:
        if held & mask and needed & mask & ~held:
            total[held & mask] = total.get(held & mask, 0) + nbytes
    found = sorted(total, key=lambda m: (-total[m], m))[:MAX_HOLDERS]
    both = 0
    for m in found:
        both |= m
    return list(dict.fromkeys([*found, both])) if found else []


def _side(nodes: Nodes, directed: int) -> tuple[str, ...]:
    link = nodes.cluster.links[directed // 2]
    return link.side_b if directed % 2 else link.side_a


def _crowded(flux: Sequence[Flux], nodes: Nodes) -> list[frozenset[int]]:
    """Sets of a few zones that demand stays in, those with most bytes."""
    zone_of = {nodes.island[node]: zone for node, zone in enumerate(nodes.zone)}
    total: dict[frozenset[int], int] = {}
    for held, needed, nbytes in flux:
        zones = frozenset(zone_of[i] for i in bits_of(held | needed))
        if 1 < len(zones) <= MAX_FEW:
            total[zones] = total.get(zones, 0) + nbytes
    return sorted(total, key=lambda z: (-total[z], sorted(z)))[:MAX_CROWDED]


def _divisions(nodes: Nodes, among: frozenset[int]) -> list[frozenset[int]]:
    zones = sorted(among)
    if len(zones) <= MAX_ZONES:
        return [frozenset(c) for size in range(1, len(zones)) for c in combinations(zones, size)]
    out = [frozenset([z]) for z in zones]
    zone_of = dict(zip((g.name for g in nodes.groups), nodes.zone, strict=True))
    for link in nodes.cluster.links:
        for side in (link.side_a, link.side_b):
            out.append(frozenset(zone_of[g] for g in side if g in zone_of) & among)
    out += [among - c for c in out]
    return [c for c in dict.fromkeys(out) if c and len(c) < len(zones)]


def _cover(nodes: Nodes, inside: frozenset[int], among: frozenset[int]) -> list[int] | None:
    """Directed links of which every way out of ``inside`` takes one, slowest together; None if a way takes none."""
    pairs = [nodes.zones.crossed[a][b] for a in sorted(inside) for b in sorted(among - inside)]
    if not all(pairs):
        return None
    rate = {i: nodes.cluster.links[i // 2].rate_gbps for p in pairs for i in p}
    single = [i for i in sorted(rate, key=lambda i: (rate[i], i)) if all(i in p for p in pairs)]
    if single:
        return single[:1]
    cover: list[int] = []
    open_pairs = [set(p) for p in pairs]
    while open_pairs:
        counts = Counter(i for p in open_pairs for i in p)
        best = min(counts, key=lambda i: (rate[i] / counts[i], i))
        cover.append(best)
        open_pairs = [p for p in open_pairs if best not in p]
    return sorted(cover)


def _islands(nodes: Nodes, zones: frozenset[int]) -> int:
    mask = 0
    for node, zone in enumerate(nodes.zone):
        if zone in zones:
            mask |= 1 << nodes.island[node]
    return mask
