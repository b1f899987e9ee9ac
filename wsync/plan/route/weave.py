"""Which zones pass bytes on to which: trees of zones, chosen for all families together, where shared links bind.

A byte crosses links as often as its tree of zones does, so what one family saves on a link another one can use. Pieces
of every family are placed one after another on the tree and the port that leave the busiest port or link the lowest,
and placed again until that is as low as it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsync.plan.nodes import Nodes, byte_cost
from wsync.plan.route.relays import GRAIN, Fan, Fans, ZoneTree
from wsync.plan.route.steep import steep
from wsync.plan.route.survey import Bundle, Family, Survey

MAX_WHOLE = 3
"""Of so many zones all trees are looked at; of more stars, chains, and those with one or two hubs."""
MAX_PAIRED = 8
"""Of so many zones two hubs are tried: their number grows with the square, and each is as wide as all ports."""
MAX_TURNS = 4
"""Of zones of so few islands each is tried as the first one of its zone; those of larger ones take turns."""
MAX_SCHEMES = 256
"""Islands take turns where trying each as the first one would be more schemes of one bundle than this."""
MAX_PIECES = 4000
"""About as many pieces are placed, unless there are more bundles."""
MAX_EACH = 200
"""Pieces of one bundle."""
MAX_TRIED = 2_000_000
"""About as many schemes are tried in all."""
MAX_SWEEPS = 40
"""Pieces are placed again at most so many times."""
ENOUGH = 1.0005
"""Parts this little busier than the least are early enough."""
STILL = 0.9999
"""The busiest part must fall by more than this in a few sweeps."""
HIGH = 1e9
"""Levels above this are equally bad: their power is still a number."""


Hops = tuple[tuple[int, int], ...]
"""As those of `ZoneTree`."""


class Scheme(NamedTuple):
    """One way of a family's bytes: the port that the holder sends by, and how they go on."""

    port: int
    tree: ZoneTree


@dataclass(eq=False, slots=True)
class _Choices:
    """Schemes of one bundle; of each the parts that it loads and which part of the unit a byte takes there."""

    schemes: list[Scheme]
    parts: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]


class Weave(Fans):
    """Fans whose bundles have trees of zones.

    Args:
        bundles: of a survey whose families may be served by holders of every zone.
        nodes: of the job.
        relay: whether relays are allowed.
        unit: attoseconds that levels are relative to: what other fans need.
        least: attoseconds at which no part is too busy.
    """

    def __init__(self, bundles: Sequence[Bundle], nodes: Nodes, relay: bool, unit: int, least: int) -> None:
        super().__init__(bundles, nodes, relay=False)
        self._relays = relay
        self._unit = max(1, unit)
        self._enough = least * ENOUGH / self._unit
        links = nodes.cluster.links
        self._first_link = len(self.speed)
        cost = [byte_cost(p.rate_gbps) for p in nodes.ports] + [byte_cost(x.rate_gbps) for x in links for _ in (0, 1)]
        self._cost = np.array(cost) / self._unit
        self._level = np.zeros(len(cost))
        self._known: dict[tuple[int, tuple[int, ...]], _Choices] = {}
        self._known_copies: dict[tuple[int, int, int], list[dict[int, float]]] = {}
        self._hops: dict[tuple[int, ...], list[Hops]] = {}
        self._place()

    def _place(self) -> None:
        pieces = [(i, n) for i in self.remote for n in self._pieces(self.bundles[i])]
        pieces.sort(key=lambda p: (-p[1], p[0]))
        chosen = [self._put(i, n) for i, n in pieces]
        tried = sum(len(self._choices(i).schemes) for i, _ in pieces)
        before = np.inf
        for sweep in range(min(MAX_SWEEPS, 1 + MAX_TRIED // max(1, tried))):
            top = float(self._level.max(initial=0.0))
            if top <= self._enough:
                break
            if sweep % 4 == 0:
                if top > before * STILL:
                    break
                before = top
            for at, (i, nbytes) in enumerate(pieces):
                self._add(i, chosen[at], -nbytes)
                chosen[at] = self._put(i, nbytes)
        total: dict[int, dict[Scheme, int]] = {}
        for (i, nbytes), at in zip(pieces, chosen, strict=True):
            found = total.setdefault(i, {})
            scheme = self._choices(i).schemes[at]
            found[scheme] = found.get(scheme, 0) + nbytes
        self._settle(total)

    def _settle(self, total: dict[int, dict[Scheme, int]]) -> None:
        self.worst = max(self.ingress, round(float(self._level.max(initial=0.0)) * self._unit))
        self.target = self.worst
        for i, found in total.items():
            self.of[i] = Fan(GRAIN)
            ports: dict[int, int] = {}
            for (port, tree), nbytes in found.items():
                ports[port] = ports.get(port, 0) + nbytes
                self.woven.setdefault((i, port), []).append((tree, nbytes))
            self.split[i] = ports
        # Routers keep the fans of every mode, and these are as wide as all ports.
        self._known.clear()
        self._known_copies.clear()

    def _pieces(self, bundle: Bundle) -> Iterator[int]:
        whole = sum(self.bundles[i].nbytes for i in self.remote)
        wanted = max(bundle.nbytes * MAX_PIECES // max(whole, 1), 1)
        count = max(1, min(wanted, MAX_EACH))
        ends = [bundle.nbytes * k // count for k in range(count + 1)]
        for a, b in pairwise(ends):
            if b > a:
                yield b - a

    def _put(self, i: int, nbytes: int) -> int:
        found, at = self._choices(i), 0
        if len(found.schemes) > 1:
            after = self._level[found.parts] + found.costs * nbytes
            weight = np.cumsum(found.costs * steep(np.minimum(after, HIGH)), axis=1)[:, -1]
            at = int(np.argmin(weight))
        self._add(i, at, nbytes)
        return at

    def _add(self, i: int, at: int, nbytes: int) -> None:
        found = self._choices(i)
        np.add.at(self._level, found.parts[at], found.costs[at] * nbytes)

    def _choices(self, i: int) -> _Choices:
        bundle = self.bundles[i]
        key = (bundle.family.number, bundle.ports)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._find_choices(bundle)
        return found

    def _find_choices(self, bundle: Bundle) -> _Choices:
        trees = self._trees(bundle)
        schemes, loads = [], []
        for port in bundle.ports:
            zone = self.nodes.zone[self.nodes.nics[self.nodes.ports[port].nics[0]].node]
            for tree, copies in zip(trees, self._carried(bundle.family, trees, zone), strict=True):
                first = sum(a < 0 for a, _ in tree.hops) or len(bundle.family.islands)
                schemes.append(Scheme(port, tree))
                loads.append({**copies, port: copies.get(port, 0.0) + first})
        width = max(len(x) for x in loads)
        parts = np.array([[*x, *[0] * (width - len(x))] for x in loads], dtype=np.int64)
        copies_of = np.array([[*x.values(), *[0.0] * (width - len(x))] for x in loads])
        return _Choices(schemes, parts, copies_of * self._cost[parts])

    def _trees(self, bundle: Bundle) -> tuple[ZoneTree, ...]:
        family = bundle.family
        zones = tuple(dict.fromkeys(family.zones))
        star = ZoneTree((), 0)
        if not self._relays or len(family.islands) < 2:
            return (star,)
        woven = self._hops.get(zones)
        if woven is None:
            woven = self._hops[zones] = trees_of_zones(zones, self._price)
        most = max(family.zones.count(z) for z in zones)
        few = most <= MAX_TURNS and most * len(woven) * len(bundle.ports) <= MAX_SCHEMES
        return (star, *(ZoneTree(hops, k) for hops in woven for k in (range(most) if few else (-1,))))

    def _price(self, a: int, b: int) -> float:
        """What a byte costs on the links between two zones."""
        return sum(float(self._cost[self._first_link + x]) for x in self.nodes.zones.crossed[a][b])

    def _carried(self, family: Family, trees: tuple[ZoneTree, ...], zone: int) -> list[dict[int, float]]:
        """Copies of a byte from a zone on every part that it passes but the sender's port, for each tree."""
        key = (family.number, zone, len(trees))
        found = self._known_copies.get(key)
        if found is None:
            found = self._known_copies[key] = [self._copies(family, tree, zone) for tree in trees]
        return found

    def _copies(self, family: Family, tree: ZoneTree, zone: int) -> dict[int, float]:
        copies: dict[int, float] = {}
        for a, b in tree.hops or tuple((-1, z) for z in family.zones):
            for x in self.nodes.zones.crossed[zone if a < 0 else a][b]:
                copies[self._first_link + x] = copies.get(self._first_link + x, 0.0) + 1.0
        for island, count in _passed_on(family, tree).items():
            ports = self._relay_ports[family.number][island]
            for p in ports:
                copies[p] = copies.get(p, 0.0) + count / len(ports)
        return copies


def _passed_on(family: Family, tree: ZoneTree) -> dict[int, float]:
    """Copies that each island passes on, by its position."""
    if not tree.hops:
        return {}
    turns = range(max(family.zones.count(z) for z in set(family.zones))) if tree.turn < 0 else (tree.turn,)
    copies: dict[int, float] = {}
    for turn in turns:
        for before, _ in woven_tree(family, ZoneTree(tree.hops, turn)):
            if before >= 0:
                copies[before] = copies.get(before, 0.0) + 1 / len(turns)
    return copies


def least_of_zones(survey: Survey, fans: Fans) -> int:
    """Attoseconds that no plan can beat: what enters islands, and what enters and leaves zones over links.

    Args:
        survey: with holders in the zones that they are nearest to.
        fans: of its bundles.
    """
    nodes = survey.nodes
    into: dict[int, int] = {}
    out: dict[int, int] = {}
    left: dict[int, int] = {}
    for leg in survey.legs:
        if leg.family.local:
            continue
        zone = leg.family.zones[0]
        held = {nodes.zone[nodes.source_node[r]] for r in leg.senders.ranks}
        if zone in held:
            continue
        into[zone] = into.get(zone, 0) + leg.nbytes
        if len(held) == 1 and left.get(leg.group_idx) is None:
            (home,) = held
            left[leg.group_idx] = home
            out[home] = out.get(home, 0) + leg.nbytes
    least = fans.ingress
    for zone, nbytes in into.items():
        others = [nodes.zones.crossed[z][zone] for z in range(nodes.zones.count) if z != zone]
        least = max(least, _over_links(nbytes, others, nodes))
    for zone, nbytes in out.items():
        others = [nodes.zones.crossed[zone][z] for z in range(nodes.zones.count) if z != zone]
        least = max(least, _over_links(nbytes, others, nodes))
    return least


def _over_links(nbytes: int, ways: Sequence[tuple[int, ...]], nodes: Nodes) -> int:
    """Attoseconds of the slowest link that all of several ways go through."""
    common = set(ways[0]).intersection(*ways[1:])
    return max((nbytes * byte_cost(nodes.cluster.links[i // 2].rate_gbps) for i in common), default=0)


def trees_of_zones(zones: tuple[int, ...], price: Callable[[int, int], float]) -> list[Hops]:
    """Trees that reach every zone from the holder: all if there are few zones.

    Args:
        zones: to reach.
        price: of a byte between two of them.
    """
    if len(zones) <= MAX_WHOLE:
        parents = [dict(zip(zones, p, strict=True)) for p in product((-1, *zones), repeat=len(zones))]
    else:
        parents = [dict.fromkeys(zones, -1), *_hubs(zones, price)]
        for k in range(len(zones)):
            for order in ((*zones[k:], *zones[:k]), (*zones[k::-1], *zones[:k:-1])):
                parents.append(dict(zip(order, (-1, *order[:-1]), strict=True)))
    trees = [_ordered(p) for p in parents]
    return list(dict.fromkeys(hops for hops in trees if hops is not None))


def _hubs(zones: tuple[int, ...], price: Callable[[int, int], float]) -> Iterator[dict[int, int]]:
    """One zone that serves the others; of few zones also two of which each serves those that are cheaper from there."""
    for hub in zones:
        yield {z: -1 if z == hub else hub for z in zones}
    if len(zones) > MAX_PAIRED:
        return
    for hub, second in permutations(zones, 2):
        parents = {z: second if price(second, z) < price(hub, z) else hub for z in zones}
        yield {**parents, hub: -1, second: hub}
        yield {**parents, hub: -1, second: -1}


def _ordered(parents: dict[int, int]) -> Hops | None:
    """Hops in an order in which zones have received before they send; None where some never do."""
    hops: list[tuple[int, int]] = []
    have = {-1}
    while len(hops) < len(parents):
        ready = [(a, z) for z, a in parents.items() if z not in have and a in have]
        if not ready:
            return None
        hops += ready
        have |= {z for _, z in ready}
    return tuple(hops)


def woven_tree(family: Family, tree: ZoneTree) -> tuple[tuple[int, int], ...]:
    """Hops between islands, by their position: each zone a chain, whose last island serves the next zones first.

    Args:
        family: that receives.
        tree: of its zones, with a turn.
    """
    if not tree.hops:
        return tuple((-1, i) for i in range(len(family.islands)))
    chains: dict[int, list[int]] = {}
    for i, zone in enumerate(family.zones):
        chains.setdefault(zone, []).append(i)
    for zone, chain in chains.items():
        start = tree.turn % len(chain)
        chains[zone] = chain[start:] + chain[:start]
    out: list[tuple[int, int]] = []
    served: dict[int, int] = {}
    for a, b in tree.hops:
        before = -1
        if a >= 0:
            # The last one passes nothing on inside its zone; after it come the others, one zone each.
            before = chains[a][-1 - served.get(a, 0) % len(chains[a])]
            served[a] = served.get(a, 0) + 1
        for island in chains[b]:
            out.append((before, island))
            before = island
    return tuple(out)
