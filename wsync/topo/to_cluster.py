"""A machine becomes a group of a cluster file: what was measured, else what such links achieve, with sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from wsync.errors import ConfigError
from wsync.spec.cluster import DEFAULT_HOST_GBPS, Nic, NicPath, NodeGroup
from wsync.topo.checks import Case
from wsync.topo.model import KIND_RANK, LOCAL_RANK, Machine
from wsync.topo.model import Nic as MachineNic
from wsync.topo.nics import assign_nics, compute_nics
from wsync.topo.placement_rates import (
    C2C_GBPS,
    HOST,
    LEAST_MEMORY_GBPS,
    MEMORY_GBPS,
    NETWORK,
    NIC_GBIT,
    NVLINK,
    efficiency,
)
from wsync.topo.platforms import profile_named
from wsync.topo.reference import pcie_gbps


class Rate(msgspec.Struct, frozen=True):
    """One rate of a group and where it is from."""

    part: str
    gbps: float
    source: str


class Converted(msgspec.Struct, frozen=True):
    """A group of nodes like the machine.

    Attributes:
        group: for the cluster file.
        nics: names of its ports, in their order.
        rates: with their sources.
        notes: what the cluster file cannot say, or what was assumed.
    """

    group: NodeGroup
    nics: tuple[str, ...]
    rates: tuple[Rate, ...]
    notes: tuple[str, ...] = ()


class Overrides(msgspec.Struct, frozen=True):
    """What the caller knows better; None for what the machine says.

    Attributes:
        platform: name of a profile.
        nic_gbit: rate of the NICs.
        domain: GPUs of one NVLink domain that spans nodes.
        measured: part (``nic``, ``nvlink``, ``pcie``, ``memory``, ``host``) to GB/s, from a bandwidth test.
    """

    platform: str | None = None
    nic_gbit: float | None = None
    domain: int | None = None
    measured: Mapping[str, float] = {}


NIC_PATHS: dict[str, Literal["PIX", "PXB", "PHB", "NODE", "SYS"]] = {
    "PIX": "PIX", "PXB": "PXB", "PHB": "PHB", "NODE": "NODE", "SYS": "SYS",
}  # fmt: skip
"""Kinds of paths to NICs that a cluster file has."""

PARTS = ("nic", "nvlink", "pcie", "memory", "host")


def to_group(machine: Machine, name: str, count: int = 1, overrides: Overrides | None = None) -> Converted:
    """A group of ``count`` nodes like ``machine``.

    Args:
        machine: what was read.
        name: of the group.
        count: of nodes.
        overrides: what the caller knows better.

    Raises:
        ConfigError: no GPU is known, no such platform, or a measured part that does not exist.
    """
    return _Builder(machine, name, count, overrides or Overrides()).build()


class _Builder:
    """Collects rates and notes on the way."""

    def __init__(self, machine: Machine, name: str, count: int, overrides: Overrides) -> None:
        unknown = sorted(set(overrides.measured) - set(PARTS))
        if unknown:
            raise ConfigError(f"measured rates of {', '.join(unknown)}, known are {', '.join(PARTS)}")
        self.machine, self.name, self.count, self.given = machine, name, count, overrides
        self.case = Case(machine, profile_named(overrides.platform) if overrides.platform else None)
        self.rates: list[Rate] = []
        self.notes: list[str] = []

    def build(self) -> Converted:
        """The group."""
        num_gpus = len(self.machine.gpus)
        if not num_gpus:
            raise ConfigError(
                f"{self.machine.host or 'the machine'} has no GPU in {', '.join(self.machine.sources) or 'its inputs'}",
                hint="give the output of `nvidia-smi topo -m`, or what `wsync topo save` wrote",
            )
        domain = self._domain(num_gpus)
        chosen = compute_nics(self.case.view, self.case.coherent)
        group = NodeGroup(
            self.name,
            self.count,
            self._rate("host", DEFAULT_HOST_GBPS, "the cluster file's default"),
            num_gpus=num_gpus,
            hbm_gbps=self._memory(),
            pcie_gbps=self._pcie(),
            nvlink_gbps=self._nvlink() if domain else None,
            nvlink_domain=domain,
            nics=tuple(self._nics(chosen)),
        )
        if self.case.view.sockets_only:
            self.notes.append("no NIC has RDMA: TCP reaches less than the rates that are assumed; --measured nic=GBPS")
        if not group.nics:
            self.notes.append("no NIC is known: nodes of this group exchange nothing with others")
        return Converted(group, tuple(n.label for n in chosen), tuple(self.rates), tuple(self.notes))

    def _rate(self, part: str, gbps: float, source: str) -> float:
        known = self.given.measured.get(part)
        if known is not None:
            gbps, source = known, "measured"
        self.rates.append(Rate(part, round(gbps, 2), source))
        return round(gbps, 2)

    def _memory(self) -> float:
        name = self.case.profile.name
        known = MEMORY_GBPS.get(name)
        return self._rate("memory", known or LEAST_MEMORY_GBPS, f"data sheet of {name}" if known else "assumed")

    def _pcie(self) -> float:
        share = efficiency(HOST)
        if self.case.coherent and self.case.profile.name != "v100-power9":
            return self._rate(
                "pcie", C2C_GBPS * share, f"C2C {C2C_GBPS:g} GB/s x {share:.3f}, fitted to published rates"
            )
        ports = [g.pcie for g in self.machine.gpus if g.pcie is not None and not self.case.virtual_signs]
        speeds = [pcie_gbps(p.speed_gtps if not p.idle else p.max_speed_gtps, p.width) for p in ports]
        known = min((s for s in speeds if s is not None), default=None)
        if known is not None:
            return self._rate("pcie", known * share, f"{known:g} GB/s of the slowest port x {share:.3f}")
        gtps = self.case.profile.pcie_gtps
        if gtps is None:
            # GPUs with 18 NVLinks or more (Hopper and later) have Gen5; of others nothing follows.
            gtps = 32.0 if (self.case.links or 0) >= 18 else 16.0
            self.notes.append(f"PCIe rates are not in the inputs: {gtps:g} GT/s x 16 is assumed; --platform")
        spec = pcie_gbps(gtps, 16) or 31.5
        return self._rate("pcie", spec * share, f"{spec:g} GB/s of {self.case.profile.name} x {share:.3f}")

    def _nvlink(self) -> float:
        active = [sum(x.active is not False for x in g.nvlinks) for g in self.machine.gpus if g.nvlinks]
        links = min(active, default=0) or self.case.links or self.case.shape.links or 1
        rate = self.case.profile.link_gbps or 25.0
        share = efficiency(NVLINK)
        return self._rate(
            "nvlink", links * rate * share, f"{links} links x {rate:g} GB/s x {share:.3f}, fitted to published rates"
        )

    def _domain(self, num_gpus: int) -> int:
        islands = self.case.view.islands
        if self.given.domain is not None:
            return self.given.domain
        if not islands:
            links_alone = self.machine.gpus and not self.case.view.gpu_paths and self.case.profile.soldered
            return num_gpus if links_alone and num_gpus > 1 else 0
        size = len(islands[0])
        consecutive = all(i == tuple(range(k * size, (k + 1) * size)) for k, i in enumerate(islands))
        if consecutive and size * len(islands) == num_gpus:
            return size
        text = " and ".join("{" + ", ".join(f"GPU{g}" for g in i) + "}" for i in islands)
        self.notes.append(
            f"NVLink joins {text}, not all {num_gpus} GPUs in equal runs: planned without NVLink; order ranks along it "
            "or repair what is missing"
        )
        return 0

    def _nics(self, chosen: Sequence[MachineNic]) -> Iterator[Nic]:
        share = efficiency(NETWORK)
        assigned = assign_nics(self.case.view, self.case.coherent)
        order = {label: i for i, label in enumerate(n.label for n in chosen)}
        for nic in chosen:
            gbit, source = self._gbit(nic)
            gbps = self.given.measured.get("nic", gbit / 8 * share)
            source = "measured" if "nic" in self.given.measured else f"{gbit:g} Gbit/s ({source}) x {share:.3f}"
            self.rates.append(Rate(nic.label, round(gbps, 2), source))
            yield Nic(round(gbps, 2), order[nic.label], tuple(self._reach(nic, assigned)))

    def _gbit(self, nic: MachineNic) -> tuple[float, str]:
        if self.given.nic_gbit is not None:
            return self.given.nic_gbit, "as given"
        if nic.rate_gbit is not None:
            return nic.rate_gbit, "of the port"
        usual = NIC_GBIT.get(self.case.profile.name, 100.0)
        note = (
            f"rates of NICs are not in the inputs: {usual:g} Gbit/s is assumed ({self.case.profile.name}); --nic-gbit"
        )
        if note not in self.notes:
            self.notes.append(note)
        return usual, "assumed"

    def _reach(self, nic: MachineNic, assigned: Mapping[int, str]) -> Iterator[NicPath]:
        """GPUs on the NIC's switch; else those that it was assigned to, or at the shortest distance."""
        paths = self.case.view.nic_paths
        kinds = {g: kinds[nic.label] for g, kinds in paths.items() if nic.label in kinds}
        index = {g.index: i for i, g in enumerate(self.machine.gpus)}
        if self.case.coherent:
            # The way over C2C and the CPU's own port is as wide as a switch; distances in the table mean nothing.
            yield from (NicPath(index[g], "PXB") for g, label in sorted(assigned.items()) if label == nic.label)
            return
        if self.case.view.sockets_only:
            # Everything takes a copy through host memory, from wherever.
            yield from (NicPath(index[g], "SYS" if kind == "SYS" else "PHB") for g, kind in sorted(kinds.items()))
            return
        near = [g for g, kind in kinds.items() if KIND_RANK[kind] <= LOCAL_RANK]
        best = min((KIND_RANK[k] for k in kinds.values()), default=0)
        for gpu, kind in sorted(kinds.items()):
            if (gpu in near or (not near and KIND_RANK[kind] == best)) and kind in NIC_PATHS:
                yield NicPath(index[gpu], NIC_PATHS[kind])
