"""When engine ranks pass bytes on: only where what leaves the holders, or crosses a shared link, would bind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wsync.plan.nodes import ATTOSECONDS, Nodes, byte_cost
from wsync.plan.route.balance import balance
from wsync.plan.route.survey import Bundle, Family

GAIN = 200
"""A relay must shorten the busiest port's time by more than one part in so many."""
MAX_SHAPES = 64
"""Of so many bundles each has trees of its own; of more, those of one family share them."""
GRAIN = 1 << 16
"""Numbers of copies are multiples of one part in so many, so that equal ones are found to be equal."""


class ZoneTree(NamedTuple):
    """How bytes go from zone to zone.

    Attributes:
        hops: (from, to) zones, those that bring bytes before those that take them on; -1 is the holder. Empty if the
            holder sends every copy.
        turn: which island of each zone is first; -1 if they take turns.
    """

    hops: tuple[tuple[int, int], ...]
    turn: int


@dataclass(frozen=True, slots=True)
class Fan:
    """How a bundle's bytes are copied.

    Attributes:
        source: copies that the holders send on average, in parts of `GRAIN`.
        relays: copies that each island of the family passes on, in parts of `GRAIN`; empty if none does.
    """

    source: int
    relays: tuple[int, ...] = ()


class Fans:
    """How many copies of its bytes a family gets from the holders; all others are relayed.

    Args:
        bundles: of all legs.
        nodes: of the job.
        relay: whether relays are allowed.

    Attributes:
        of: the fan of each bundle.
        ingress: attoseconds until the last island has received all that it needs.
        target: attoseconds that the busiest port or link needs at least.
        worst: attoseconds that it will need if ports of a node are used evenly.
        load: bytes that each port passes on.
        speed: bytes per second of each port.
        split: what each port sends of a bundle, where that is decided already.
        woven: what a bundle's port sends along which trees of zones, likewise.
    """

    def __init__(self, bundles: Sequence[Bundle], nodes: Nodes, relay: bool) -> None:
        self.nodes = nodes
        self.bundles = bundles
        self.remote = [i for i, b in enumerate(bundles) if not b.family.local]
        self.speed = [max(1, round(p.rate_gbps * 1e9)) for p in nodes.ports]
        self.of = [Fan(len(b.family.islands) * GRAIN) for b in bundles]
        self.load = [0] * len(self.speed)
        self.split: dict[int, dict[int, int]] = {}
        self.woven: dict[tuple[int, int], list[tuple[ZoneTree, int]]] = {}
        self._relay_ports = self._find_relay_ports()
        self.ingress = ingress = self._ingress()
        star, star_link = self._sent({})
        self.worst = max(self._worst(star), self._worst_link(star_link), ingress)
        self.target = self.worst
        if relay and self.worst > ingress + ingress // GAIN:
            self._relay(ingress, star, star_link)

    def _find_relay_ports(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """For each remote family the ports of each of its islands."""
        found: dict[int, tuple[tuple[int, ...], ...]] = {}
        for i in self.remote:
            family = self.bundles[i].family
            if family.number not in found:
                sinks = self.nodes.sinks
                found[family.number] = tuple(
                    tuple(sorted({sinks[s].port for s in members} - {-1})) for members in family.members
                )
        return found

    def _sent(self, copies: dict[int, int]) -> tuple[list[int], list[int]]:
        """Bytes that holders send through each port and each directed link; every copy of families not given."""
        load = [0] * len(self.speed)
        work = []
        for i in self.remote:
            bundle = self.bundles[i]
            work.append((bundle.nbytes * copies.get(bundle.family.number, len(bundle.family.islands)), bundle.ports))
        split = _balance(work, load, self.speed)
        link = [0] * (2 * len(self.nodes.cluster.links))
        if link:
            for i, parts in zip(self.remote, split, strict=True):
                self._cross(self.bundles[i], parts, link)
        return load, link

    def _cross(self, bundle: Bundle, parts: dict[int, int], link: list[int]) -> None:
        """Add what a bundle's holders send through links: each copy goes to a zone of the family."""
        family = bundle.family
        for zone in sorted(set(family.zones)):
            part = family.zones.count(zone) / len(family.islands)
            for port, nbytes in parts.items():
                for i in self.crossed(port, zone):
                    link[i] += round(nbytes * part)

    def crossed(self, port: int, zone: int) -> tuple[int, ...]:
        """Directed links between a port and a zone."""
        node = self.nodes.nics[self.nodes.ports[port].nics[0]].node
        return self.nodes.zones.crossed[self.nodes.zone[node]][zone]

    def _worst(self, load: Sequence[int]) -> int:
        return max((n * ATTOSECONDS // s for n, s in zip(load, self.speed, strict=True)), default=0)

    def _worst_link(self, load: Sequence[int]) -> int:
        links = self.nodes.cluster.links
        return max((n * byte_cost(links[i // 2].rate_gbps) for i, n in enumerate(load)), default=0)

    def _ingress(self) -> int:
        rates: dict[int, float] = {}
        for nic in self.nodes.nics:
            island = self.nodes.island[nic.node]
            rates[island] = rates.get(island, 0.0) + nic.rate_gbps
        into: dict[int, int] = {}
        for i in self.remote:
            for island in self.bundles[i].family.islands:
                into[island] = into.get(island, 0) + self.bundles[i].nbytes
        return max((n * byte_cost(rates[i]) for i, n in into.items()), default=0)

    def _relay(self, ingress: int, star: list[int], star_link: list[int]) -> None:
        """Relays, if they help: as few as the best level of the ports allows, else as that level needs them."""
        least, least_link = self._sent({self.bundles[i].family.number: 1 for i in self.remote})
        load, fans = self._evened()
        best = max(ingress, self._worst(load), self._worst_link(least_link))
        if self.worst <= best + best // GAIN:
            return
        self.target = best
        copies = self._spare(star, least, star_link, least_link)
        few_load, few_link, relayed, few = self._poured(copies)
        if max(self._worst(few_load), self._worst_link(few_link)) <= best + best // GAIN:
            self.load, fans = relayed, few
            self.worst = max(ingress, self._worst(few_load), self._worst_link(few_link))
        else:
            self.load = self._relayed(fans)
            self.worst = best
        for i, fan in zip(self.remote, fans, strict=True):
            self.of[i] = fan

    def _evened(self) -> tuple[list[int], list[Fan]]:
        """The lowest level of the busiest port: holders send each byte at least once, and all who have it the rest."""
        load = [0] * len(self.speed)
        work: list[tuple[int, tuple[int, ...]]] = []
        for i in self.remote:
            bundle = self.bundles[i]
            relays = tuple(sorted({p for ports in self._relay_ports[bundle.family.number] for p in ports}))
            thin = any(self.crossed(p, z) for p in bundle.ports for z in set(bundle.family.zones))
            more = relays if thin else tuple(sorted({*relays, *bundle.ports}))
            work.append((bundle.nbytes, bundle.ports))
            work.append((bundle.nbytes * (len(bundle.family.islands) - 1), more))
        split = _balance(work, load, self.speed)
        if len(self.remote) > MAX_SHAPES:
            return load, self._shared_fans(split[1::2])
        fans = [
            self._fan(self.bundles[i].family, self.bundles[i].nbytes, s)
            for i, s in zip(self.remote, split[1::2], strict=True)
        ]
        return load, fans

    def _shared_fans(self, split: Sequence[dict[int, int]]) -> list[Fan]:
        """One fan for each family, of all its bundles together."""
        total: dict[int, dict[int, int]] = {}
        nbytes: dict[int, int] = {}
        for i, parts in zip(self.remote, split, strict=True):
            bundle = self.bundles[i]
            number = bundle.family.number
            nbytes[number] = nbytes.get(number, 0) + bundle.nbytes
            add = total.setdefault(number, {})
            for port, n in parts.items():
                add[port] = add.get(port, 0) + n
        families = {self.bundles[i].family.number: self.bundles[i].family for i in self.remote}
        fans = {n: self._fan(families[n], nbytes[n], parts) for n, parts in total.items()}
        return [fans[self.bundles[i].family.number] for i in self.remote]

    def _fan(self, family: Family, nbytes: int, parts: dict[int, int]) -> Fan:
        """From bytes of each port beyond the first copy; ports that are no island's are holders'."""
        islands = self._relay_ports[family.number]
        relays = tuple(round(sum(parts.get(p, 0) for p in ports) * GRAIN / max(nbytes, 1)) for ports in islands)
        source = max(GRAIN, len(islands) * GRAIN - sum(relays))
        return Fan(source, relays if any(relays) else ())

    def _spare(self, star: list[int], least: list[int], star_link: list[int], least_link: list[int]) -> dict[int, int]:
        """Copies of each family that holders send as far as their ports and the links allow at the target."""
        links = self.nodes.cluster.links
        ports = [
            _free(load, low, self.target * s // ATTOSECONDS)
            for load, low, s in zip(star, least, self.speed, strict=True)
        ]
        shared = [
            _free(star_link[i], least_link[i], self.target // byte_cost(links[i // 2].rate_gbps))
            for i in range(len(star_link))
        ]
        part: dict[int, float] = {}
        for i in self.remote:
            bundle = self.bundles[i]
            frees = [ports[p] for p in bundle.ports]
            frees += [shared[x] for p in bundle.ports for z in set(bundle.family.zones) for x in self.crossed(p, z)]
            part[bundle.family.number] = min([part.get(bundle.family.number, 1.0), *frees])
        families = {self.bundles[i].family.number: self.bundles[i].family for i in self.remote}
        return {n: 1 + int((len(families[n].islands) - 1) * p + 1e-9) for n, p in part.items()}

    def _poured(self, copies: dict[int, int]) -> tuple[list[int], list[int], list[int], list[Fan]]:
        """Relays for the copies that holders do not send: (load of ports, of links, the part of relays, fans)."""
        sent, link = self._sent(copies)
        nbytes: dict[int, int] = {}
        for i in self.remote:
            number = self.bundles[i].family.number
            nbytes[number] = nbytes.get(number, 0) + self.bundles[i].nbytes
        families = {self.bundles[i].family.number: self.bundles[i].family for i in self.remote}
        numbers = list(families)
        work = []
        for n in numbers:
            ports = tuple(sorted({p for own in self._relay_ports[n] for p in own}))
            work.append((nbytes[n] * (len(families[n].islands) - copies[n]), ports))
        load = list(sent)
        split = _balance(work, load, self.speed)
        fans = {n: self._fan(families[n], nbytes[n], parts) for n, parts in zip(numbers, split, strict=True)}
        relayed = [a - b for a, b in zip(load, sent, strict=True)]
        return load, link, relayed, [fans[self.bundles[i].family.number] for i in self.remote]

    def _relayed(self, fans: Sequence[Fan]) -> list[int]:
        """Bytes that each port passes on."""
        load = [0] * len(self.speed)
        for i, fan in zip(self.remote, fans, strict=True):
            bundle = self.bundles[i]
            for ports, amount in zip(self._relay_ports[bundle.family.number], fan.relays, strict=False):
                for p in ports:
                    load[p] += bundle.nbytes * amount // GRAIN // len(ports)
        return load


def _free(star: int, least: int, limit: int) -> float:
    """The part of the copies beyond the first that fits under ``limit``, at most one."""
    if star <= limit or star <= least:
        return 1.0
    return max(0, limit - least) / (star - least)


def _balance(
    work: Iterable[tuple[int, tuple[int, ...]]], load: list[int], speed: Sequence[int]
) -> list[dict[int, int]]:
    """As `balance`, with equal candidates balanced together; each piece gets its part of what they get."""
    pieces = list(work)
    total: dict[tuple[int, ...], int] = {}
    for amount, machines in pieces:
        total[machines] = total.get(machines, 0) + amount
    shares = dict(zip(total, balance([(n, k) for k, n in total.items()], load, speed), strict=True))
    return [{m: x * amount // max(total[k], 1) for m, x in shares[k].items()} for amount, k in pieces]
