"""When engine ranks pass bytes on: only where what leaves the holders, or crosses a shared link, would bind."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.nodes import ATTOSECONDS, Nodes, byte_cost
from wsync.plan.route.balance import balance
from wsync.plan.route.survey import Family, Leg

GAIN = 200
"""A relay must shorten the busiest port's time by more than one part in so many."""

Bundle = tuple[Family, tuple[int, ...]]
"""What legs of one family and the same candidate ports have in common."""


def bundles_of(legs: Sequence[Leg]) -> dict[tuple[int, tuple[int, ...]], tuple[Bundle, int]]:
    """The bytes of all remote legs by family and candidate ports."""
    out: dict[tuple[int, tuple[int, ...]], tuple[Bundle, int]] = {}
    for leg in legs:
        if not leg.family.local:
            ports = tuple(leg.senders.by_port)
            key = (id(leg.family), ports)
            before = out.get(key)
            out[key] = ((leg.family, ports), leg.nbytes + (before[1] if before else 0))
    return out


def speeds(nodes: Nodes) -> list[int]:
    """Bytes per second of every port."""
    return [max(1, round(p.rate_gbps * 1e9)) for p in nodes.ports]


class Fans:
    """How many copies of its bytes a family gets from the holders; all others are relayed.

    Args:
        legs: of all groups.
        nodes: of the job.
        relay: whether relays are allowed.

    Attributes:
        copies: by ``id`` of the family.
        target: attoseconds that the busiest port or link needs at least.
    """

    def __init__(self, legs: Sequence[Leg], nodes: Nodes, relay: bool) -> None:
        self.nodes = nodes
        self.bundles = list(bundles_of(legs).values())
        self.speed = speeds(nodes)
        self.copies = {id(f): len(f.islands) for (f, _), _ in self.bundles}
        star, star_load, star_link = self._spread(self.copies)
        _, least_load, least_link = self._spread(dict.fromkeys(self.copies, 1))
        ingress = self._ingress()
        need = max(ingress, self._worst(least_load), self._worst_link(least_link), self._traffic())
        worst = max(self._worst(star_load), self._worst_link(star_link))
        self.target = max(need if relay else worst, ingress)
        if relay and worst > self.target + self.target // GAIN:
            self._relay(star, star_load, least_load, star_link, least_link)

    def _spread(self, copies: dict[int, int]) -> tuple[list[dict[int, int]], list[int], list[int]]:
        """Bytes of each bundle on each port, of each port and of each directed link."""
        load = [0] * len(self.nodes.ports)
        split = balance([(n * copies[id(f)], ports) for (f, ports), n in self.bundles], load, self.speed)
        link = [0] * (2 * len(self.nodes.cluster.links))
        if link:
            for ((family, _), _), parts in zip(self.bundles, split, strict=True):
                for port, nbytes in parts.items():
                    for i in self.crossed(port, family):
                        link[i] += nbytes
        return split, load, link

    def crossed(self, port: int, family: Family) -> tuple[int, ...]:
        """Directed links between a port and a family."""
        node = self.nodes.nics[self.nodes.ports[port].nics[0]].node
        return self.nodes.zones.crossed[self.nodes.zone[node]][family.zone]

    def _worst(self, load: list[int]) -> int:
        return max((n * ATTOSECONDS // s for n, s in zip(load, self.speed, strict=True)), default=0)

    def _worst_link(self, load: list[int]) -> int:
        links = self.nodes.cluster.links
        return max((n * byte_cost(links[i // 2].rate_gbps) for i, n in enumerate(load)), default=0)

    def _island_rates(self) -> dict[int, float]:
        rates: dict[int, float] = {}
        for nic in self.nodes.nics:
            island = self.nodes.island[nic.node]
            rates[island] = rates.get(island, 0.0) + nic.rate_gbps
        return rates

    def _ingress(self) -> int:
        into: dict[int, int] = {}
        for (family, _), nbytes in self.bundles:
            for island in family.islands:
                into[island] = into.get(island, 0) + nbytes
        rates = self._island_rates()
        return max((n * byte_cost(rates[i]) for i, n in into.items()), default=0)

    def _traffic(self) -> int:
        """All that enters islands, sent by every island that may."""
        rates, total = self._island_rates(), 0
        senders: set[int] = set()
        for (family, ports), nbytes in self.bundles:
            total += nbytes * len(family.islands)
            senders.update(family.islands)
            senders.update(self.nodes.island[self.nodes.nics[self.nodes.ports[p].nics[0]].node] for p in ports)
        return total * byte_cost(sum(rates[i] for i in sorted(senders))) if total else 0

    def _relay(
        self,
        star: list[dict[int, int]],
        star_load: list[int],
        least_load: list[int],
        star_link: list[int],
        least_link: list[int],
    ) -> None:
        """Every copy beyond the first is sent by holders as far as their ports and the links allow at the target."""
        links = self.nodes.cluster.links
        ports = [
            _free(load, least, self.target * s // ATTOSECONDS)
            for load, least, s in zip(star_load, least_load, self.speed, strict=True)
        ]
        shared = [
            _free(star_link[i], least_link[i], self.target // byte_cost(links[i // 2].rate_gbps))
            for i in range(len(star_link))
        ]
        part: dict[int, tuple[int, int]] = {}
        for ((family, _), _), split in zip(self.bundles, star, strict=True):
            for port in split:
                for free in (ports[port], *(shared[i] for i in self.crossed(port, family))):
                    before = part.get(id(family))
                    if before is None or free[0] * before[1] < before[0] * free[1]:
                        part[id(family)] = free
        for key, count in self.copies.items():
            got, of = part.get(key, (1, 1))
            self.copies[key] = 1 + (count - 1) * got // of


def _free(star: int, least: int, limit: int) -> tuple[int, int]:
    """The part of the copies beyond the first that fits under ``limit``, as a fraction of at most one."""
    if star <= limit or star <= least:
        return 1, 1
    return max(0, limit - least), star - least
