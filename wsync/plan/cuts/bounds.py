"""Cuts of the cluster that no plan can beat.

Source: the max-flow min-cut argument. For a set of nodes, bytes that have a needer and no holder inside must enter it,
and bytes that have all holders inside and a needer outside must leave it, each at least once.

A plan here is one in which trainer ranks only send what they hold, engine ranks only pass on what they need themselves,
and a rank uses the NICs that `wsync.plan.places` says it reaches. The cuts of nodes, of NVLink domains that span nodes
and of links between all zones hold of every other plan too. Those of the NICs of some ranks, of the traffic between
nodes and of links between some zones do not: a GPU that copies what it does not need over PCIe to lend its NIC to
another would beat them. So would one that lends its PCIe to a GPU of its own NVLink domain beat those of single ranks
and those of PCIe. Weights in host memory are packed on the GPU of a rank that holds them, each piece brought there for
itself, and engine ranks that keep in host memory what they receive have a copy each: a trainer that feeds two recipes
from one pass over PCIe, or packs on the host, and ranks that share one copy in the memory of their node would beat the
cuts of what is staged.
"""

from __future__ import annotations

from collections.abc import Sequence

from wsync.plan.cuts.links import guarded_cuts, link_cuts
from wsync.plan.cuts.search import bits_of, entering, grown, island_rates, leaving, worst_senders
from wsync.plan.cuts.staged import staged_cuts
from wsync.plan.cuts.tally import Tally, tally
from wsync.plan.flows import DemandGroup
from wsync.plan.nodes import Nodes
from wsync.plan.places import Lane
from wsync.plan.types import Bound
from wsync.spec.manifest import SinkManifest

MAX_HOLDERS = 16
"""Sets of holders that unions are tried of, the heaviest first."""
MAX_PORT_SETS = 600
"""Where ranks reach more sets of NICs than this, single nodes and ranks say enough."""


def find_bounds(
    groups: Sequence[DemandGroup],
    nodes: Nodes,
    sink: SinkManifest | None = None,
    *,
    relay: bool = True,
    nbytes: Sequence[int] | None = None,
    packed_bytes: Sequence[int] | None = None,
    host_bytes: Sequence[int] | None = None,
) -> tuple[Bound, ...]:
    """Every cut that is looked at, the slowest first.

    Args:
        groups: what has to be carried.
        nodes: of the job.
        sink: for the names of engine ranks.
        relay: False for what holds of plans in which engine ranks pass nothing on to other nodes.
        nbytes: of each group on another wire (all in bf16, say), in place of its own.
        packed_bytes: of each group, read and written in the memory of the GPU that packs it. `plan_times` takes the
            same by trainer rank.
        host_bytes: of each group, weights that are packed: what an offloaded trainer rank brings to its GPU first.
    """
    return _Cuts(tally(groups, nodes, nbytes, packed_bytes, host_bytes), nodes, relay).all(sink)


def gpu_gbps(nodes: Nodes, lane: Lane, *, beside_host: bool = False) -> float:
    """GB/s at which one rank's GPU exchanges bytes with all others: NVLink and PCIe, else PCIe, else host memory.

    Over PCIe go the GPU's own NICs, and where a node has several NVLink domains whatever is between them; also what is
    exchanged with engine ranks that keep it in the memory of the node (``beside_host``).
    """
    group = nodes.groups[lane.node]
    if lane.domain < 0 or group.nvlink_gbps is None:
        return group.local_gbps
    own = sum(nodes.nics[i].rate_gbps for i in lane.own)
    pcie = group.pcie_gbps or own
    is_only_of_nics = group.nvlink_domain >= group.num_gpus and not beside_host
    return group.nvlink_gbps + (min(own, pcie) if is_only_of_nics else pcie)


class _Cuts:
    def __init__(self, total: Tally, nodes: Nodes, relay: bool) -> None:
        self.total = total
        self.nodes = nodes
        self.relay = relay
        self.rates = island_rates(nodes)
        self.found: dict[str, float] = {}

    def all(self, sink: SinkManifest | None) -> tuple[Bound, ...]:
        self._islands()
        self._sets()
        self._traffic()
        self._ports()
        for name, nbytes, rate in link_cuts(self.total.flux, self.nodes):
            self._add(name, nbytes, rate)
        for name, nbytes, rate in guarded_cuts(self.total.flux, self.nodes, self.rates, self._names):
            self._add(name, nbytes, rate)
        for name, nbytes, rate in staged_cuts(self.total, self.nodes):
            self._add(name, nbytes, rate)
        self._ranks(sink)
        self._memory()
        self._packing()
        bounds = [Bound(name, seconds) for name, seconds in self.found.items()]
        return tuple(sorted(bounds, key=lambda b: (-b.seconds, b.name)))

    def _add(self, name: str, nbytes: int, rate_gbps: float) -> None:
        """Note a cut. Several may have one name: large sets are named by their first node."""
        if nbytes and rate_gbps:
            self.found[name] = max(self.found.get(name, 0.0), nbytes / (rate_gbps * 1e9))

    def _rate(self, mask: int) -> float:
        return sum(self.rates[i] for i in bits_of(mask))

    def _islands(self) -> None:
        into, out = [0] * len(self.rates), [0] * len(self.rates)
        for held, needed, nbytes in self.total.flux:
            for i in bits_of(needed & ~held):
                into[i] += nbytes
            if held & (held - 1) == 0 and needed & ~held:
                out[held.bit_length() - 1] += nbytes * (1 if self.relay else (needed & ~held).bit_count())
        for i, name in enumerate(self.nodes.island_names):
            self._add(f"ingress of {name}", into[i], self.rates[i])
            self._add(f"egress of {name}", out[i], self.rates[i])

    def _sets(self) -> None:
        """All trainer nodes, all engine nodes, the holders of each pipeline stage, and unions of holders."""
        flux, nodes = self.total.flux, self.nodes
        trainers = self._mask(nodes.source_node)
        engines = self._mask(nodes.sink_node)

        def egress_s(mask: int) -> float:
            rate = self._rate(mask)
            return leaving(flux, mask, self.relay) / (rate * 1e9) if rate else 0.0

        held = self._heavy_holders()
        if trainers.bit_count() > 1:
            self._add("egress of all trainer nodes", leaving(flux, trainers, self.relay), self._rate(trainers))
        worst = worst_senders(flux, self.rates, self.relay)
        for mask in dict.fromkeys([*held[:8], worst, *(grown(m, held, egress_s) for m in (*held[:1], worst))]):
            if mask.bit_count() > 1 and mask != trainers:
                self._add(f"egress of {self._names(mask)}", leaving(flux, mask, self.relay), self._rate(mask))
        if engines.bit_count() > 1:
            self._add("ingress of all engine nodes", entering(flux, engines), self._rate(engines))

    def _heavy_holders(self) -> list[int]:
        """Sets of several islands that hold the same bytes, those first that take longest to send their own once."""
        own: dict[int, int] = {}
        for held, needed, nbytes in self.total.flux:
            if held & (held - 1) and needed & ~held:
                own[held] = own.get(held, 0) + nbytes
        seconds = {m: n / self._rate(m) for m, n in own.items() if self._rate(m)}
        return sorted(seconds, key=lambda m: (-seconds[m], m))[:MAX_HOLDERS]

    def _mask(self, node_of: Sequence[int]) -> int:
        mask = 0
        for node in set(node_of):
            mask |= 1 << self.nodes.island[node]
        return mask

    def _names(self, mask: int) -> str:
        names = [self.nodes.island_names[i] for i in bits_of(mask)]
        if len(names) > 4:
            return f"{names[0]} and {len(names) - 1} others that hold the same bytes"
        return ", ".join(names)

    def _traffic(self) -> None:
        """All that enters islands is sent by those that hold it or, with relays, by those that need it."""
        total, allowed = 0, 0
        for held, needed, nbytes in self.total.flux:
            if needed & ~held:
                total += nbytes * (needed & ~held).bit_count()
                allowed |= held | (needed if self.relay else 0)
        self._add("traffic between nodes", total, self._rate(allowed))

    def _ports(self) -> None:
        """Where ranks of a node do not reach all its NICs: what only those behind the same NICs need or hold."""
        whole = self._island_nics()
        for what, by_ports in (("ingress", self.total.needed), ("egress", self.total.ports_out)):
            if len(by_ports) > MAX_PORT_SETS:
                continue
            for ports in by_ports:
                if any(p < 0 for p in ports):
                    continue
                nics = sorted({i for p in ports for i in self.nodes.ports[p].nics})
                if nics in whole:
                    continue  # the cuts of islands have these bytes and more
                inside = set(ports)
                nbytes = sum(n for k, n in by_ports.items() if set(k) <= inside)
                rate = sum(self.nodes.nics[i].rate_gbps for i in nics)
                self._add(f"{what} of {self._nic_names(nics)}", nbytes, rate)

    def _island_nics(self) -> list[list[int]]:
        of_island: dict[int, list[int]] = {}
        for i, nic in enumerate(self.nodes.nics):
            of_island.setdefault(self.nodes.island[nic.node], []).append(i)
        return list(of_island.values())

    def _nic_names(self, nics: list[int]) -> str:
        by_node: dict[int, list[int]] = {}
        for i in nics:
            by_node.setdefault(self.nodes.nics[i].node, []).append(self.nodes.nics[i].slot)
        parts = [f"nics {', '.join(map(str, s))} of node {self.nodes.names[n]}" for n, s in list(by_node.items())[:4]]
        return ", ".join(parts) + (f" and of {len(by_node) - 4} other nodes" if len(by_node) > 4 else "")

    def _ranks(self, sink: SinkManifest | None) -> None:
        nodes = self.nodes
        hosts = {lane.node for lane in nodes.sinks if lane.in_host}
        for rank, nbytes in enumerate(self.total.rank_out):
            lane = nodes.sources[rank]
            rate = gpu_gbps(nodes, lane, beside_host=lane.node in hosts)
            self._add(f"egress of trainer rank {rank}", nbytes, rate)
        for i, nbytes in enumerate(self.total.sink_in):
            lane = nodes.sinks[i]
            if lane.in_host:
                continue  # all that it installs crosses PCIe, and that is a cut of its own
            name = f"rank {sink.ranks[i].rank} of replica {sink.ranks[i].replica}" if sink else f"sink {i}"
            self._add(f"install on {name}", nbytes, gpu_gbps(nodes, lane, beside_host=lane.node in hosts))

    def _memory(self) -> None:
        for i, group in enumerate(self.nodes.groups):
            if not group.num_gpus:
                self._add(f"host memory of node {self.nodes.names[i]}", self.total.memory[i], group.host_gbps)

    def _packing(self) -> None:
        packed, nodes = self.total.packed, self.nodes
        hbm = [nodes.groups[n].hbm_gbps or 0.0 for n in nodes.source_node]
        for ranks, nbytes in packed.items():
            if len(ranks) == 1:
                self._add(f"quantise on trainer rank {ranks[0]}", nbytes, hbm[ranks[0]])
        holders = {r for ranks in packed for r in ranks}
        if holders and all(hbm[r] for r in holders):
            gpus = {(nodes.sources[r].node, nodes.sources[r].gpu): hbm[r] for r in holders}
            self._add("quantise on all trainer ranks", sum(packed.values()), sum(gpus.values()))
