"""From what was read of ``/sys`` to NICs, bridges, NVSwitches and NUMA nodes, and to the distances between devices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from wsync.topo.live.gpudirect import DRIVER, KERNEL, MODULES, why_not_direct
from wsync.topo.live.records import Answer, Refusal
from wsync.topo.live.sysfs import BUS_ID, INFINIBAND, NETWORK, NODES, PCI
from wsync.topo.model import KernelLine, Machine, Nic, NumaNode, Oddity, PathKind, PciDevice, Pcie
from wsync.topo.parse.lspci import NVSWITCHES
from wsync.topo.parse.text import gbit, possible_rate, speed_gtps

SOURCE = "sysfs"
ACS_REDIRECT = 0b1100
"""Request redirect and completion redirect: traffic of peers goes up to the root and down again."""


NETWORK_CARD = "0x02"
"""PCI class of network controllers."""
ETHERNET = "1"
"""ARPHRD_ETHER. Source: Linux ``include/uapi/linux/if_arp.h``."""


class Host:
    """What ``/sys`` and ``/proc`` said, by path."""

    def __init__(self, told: list[Answer | Refusal]) -> None:
        self.texts: dict[str, str] = {
            t.call: t.value for t in told if isinstance(t, Answer) and isinstance(t.value, str)
        }
        self.acs = {
            t.call.split("/")[-2]: t.value
            for t in told
            if isinstance(t, Answer) and isinstance(t.value, int) and t.call.endswith("/config")
        }
        self.refused = tuple(t.call for t in told if isinstance(t, Refusal))
        self.tree = PciTree(self.texts)

    def names(self, folder: str) -> list[str]:
        return self.texts.get(folder, "").split()

    @property
    def one_node(self) -> bool:
        """The system has one NUMA node (or none that is told)."""
        return sum(re.fullmatch(r"node\d+", n) is not None for n in self.names(NODES)) <= 1

    def attribute(self, bus: str, name: str) -> str | None:
        return self.texts.get(f"{PCI}/{bus}/{name}")

    def device_id(self, bus: str) -> str | None:
        vendor, device = self.attribute(bus, "vendor"), self.attribute(bus, "device")
        return f"{vendor.removeprefix('0x')}:{device.removeprefix('0x')}" if vendor and device else None

    def numa(self, bus: str) -> tuple[int, ...] | None:
        """The node; ``()`` for -1 where there are several, which says that they are hidden from the device."""
        text = self.attribute(bus, "numa_node")
        if text is None or re.fullmatch(r"-?\d{1,4}", text) is None:
            return None
        if int(text) >= 0:
            return (int(text),)
        return None if self.one_node else ()

    def pcie(self, bus: str) -> Pcie | None:
        """Speed and width now, and the most that both ends of the link can do."""
        if self.attribute(bus, "current_link_speed") is None:
            return None
        ends = [bus, *self.tree.parents(bus)[:1]]
        speeds = [s for end in ends if (s := speed_gtps(self.attribute(end, "max_link_speed"))) is not None]
        widths = [w for end in ends if (w := self._width(end, "max_link_width"))]
        return Pcie(
            speed_gtps(self.attribute(bus, "current_link_speed")),
            self._width(bus, "current_link_width"),
            min(speeds, default=None),
            min(widths, default=None),
        )

    def _width(self, bus: str, name: str) -> int | None:
        text = self.attribute(bus, name) or ""
        return int(text) if text.isdigit() and len(text) < 4 else None

    def gpus(self) -> list[str]:
        """Bus ids of NVIDIA's GPUs that PCIe has, whether or not a driver runs them."""
        return [b for b in self.tree.chains if self.attribute(b, "vendor") == "0x10de" and self._is_gpu(b)]

    def _is_gpu(self, bus: str) -> bool:
        return (self.attribute(bus, "class") or "").startswith(("0x0300", "0x0302"))

    def distance(self, a: str, b: str) -> PathKind | None:
        """How two devices reach each other, in the words of ``nvidia-smi topo -m``; None if either is not there."""
        if a not in self.tree.chains or b not in self.tree.chains:
            return None
        kind = self.tree.distance(a, b)
        if kind is not None:
            return kind
        nodes = self.numa(a), self.numa(b)
        return "NODE" if self.one_node or (nodes[0] == nodes[1] and nodes[0]) else "SYS"


class PciTree:
    """Which bridges are above each device."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.roots: dict[str, str] = {}
        self.chains: dict[str, list[str]] = {}
        for bus in texts.get(PCI, "").split():
            place = texts.get(f"{PCI}/{bus}", "")
            buses = BUS_ID.findall(place)
            root = re.findall(r"/(pci[0-9a-f]+:[0-9a-f]+)(?=/)", place)
            if buses and buses[-1] == bus:
                self.chains[bus] = buses[-2::-1]
                self.roots[bus] = root[-1] if root else ""

    def parents(self, bus: str) -> list[str]:
        """Bridges above a device, nearest first, up to the root port."""
        return self.chains.get(bus, [])

    def distance(self, a: str, b: str) -> PathKind | None:
        """Within one host bridge; None for what is not.

        A switch is two bridges: its upstream port, and a downstream port for each device. Devices that meet at an
        upstream port next above their own downstream ports share one switch (PIX); that meet higher, several (PXB).
        """
        mine, theirs = self.chains[a], self.chains[b]
        common = next((bridge for bridge in mine if bridge in theirs), None)
        if common is not None:
            return "PIX" if max(mine.index(common), theirs.index(common)) <= 1 else "PXB"
        same = self.roots[a] == self.roots[b] and self.roots[a] != ""
        return "PHB" if same else None


def read_machine(host: Host) -> Machine:
    """NICs, bridges above them and above GPUs, NVSwitches, NUMA nodes, the kernel's command line."""
    nics = tuple(_nics(host)) or tuple(_interfaces(host))
    gpus = host.gpus()
    used = dict.fromkeys(b for d in [*gpus, *(n.bus_id for n in nics if n.bus_id)] for b in host.tree.parents(d))
    command_line = host.texts.get("/proc/cmdline")
    return Machine(
        nics=nics,
        pci=(*(_bridge(host, b) for b in used), *_switches(host)),
        numa_nodes=tuple(_numa_nodes(host)),
        kernel=(KernelLine(command_line),) if command_line else (),
        oddities=(*_redirects(host, gpus, set(used)), *_translations(host, gpus), *_gpudirect(host)),
        sources=(SOURCE,),
    )


def _nics(host: Host) -> Iterator[Nic]:
    for name in host.names(INFINIBAND):
        buses = BUS_ID.findall(host.texts.get(f"{INFINIBAND}/{name}/device", ""))
        if not buses:
            # Software devices (rxe, siw) hang from no bus.
            continue
        base = _nic(host, name, buses[-1])
        ports = sorted(host.names(f"{INFINIBAND}/{name}/ports"), key=lambda p: (len(p), p))
        for port in ports:
            yield _port(host, base, f"{INFINIBAND}/{name}/ports/{port}", port)
        if not ports:
            yield base


def _nic(host: Host, name: str, bus: str) -> Nic:
    return Nic(
        name,
        bus_id=bus,
        device_id=host.device_id(bus),
        numa=host.numa(bus),
        parent=next(iter(host.tree.parents(bus)), None),
        pcie=host.pcie(bus),
        virtual=True if host.attribute(bus, "physfn") else None,
    )


def _interfaces(host: Host) -> Iterator[Nic]:
    """Ethernet of network cards; not that of USB, and not virtual functions, whose port is that of their card."""
    for name in host.names(NETWORK):
        buses = BUS_ID.findall(host.texts.get(f"{NETWORK}/{name}/device", ""))
        if not buses or not (host.attribute(buses[-1], "class") or "").startswith(NETWORK_CARD):
            continue
        nic = _nic(host, name, buses[-1])
        if host.texts.get(f"{NETWORK}/{name}/type") == ETHERNET and not nic.virtual:
            speed = host.texts.get(f"{NETWORK}/{name}/speed", "")
            state = host.texts.get(f"{NETWORK}/{name}/operstate")
            yield replace(
                nic,
                state={"up": "ACTIVE", "down": "DOWN", "lowerlayerdown": "DOWN"}.get(state or ""),
                rate_gbit=possible_rate(int(speed) / 1000) if re.fullmatch(r"\d{1,9}", speed) else None,
                link_layer="Ethernet",
                gdr=False,
                rdma=False,
            )


def _port(host: Host, device: Nic, folder: str, port: str) -> Nic:
    """One port, with the words that ``ibstatus`` uses; port 2 of a device is called ``mlx5_0:2``."""
    state = host.texts.get(f"{folder}/state", "").partition(":")[2].strip() or None
    physical = host.texts.get(f"{folder}/phys_state", "")
    return replace(
        device,
        label=device.label if port == "1" else f"{device.label}:{port}",
        port=int(port) if port.isdigit() else None,
        state="DOWN" if state == "ACTIVE" and physical and "LinkUp" not in physical else state,
        rate_gbit=gbit(host.texts.get(f"{folder}/rate")),
        link_layer=host.texts.get(f"{folder}/link_layer"),
    )


def _bridge(host: Host, bus: str) -> PciDevice:
    """A bridge; its link only where it leads towards the CPU, so that no link is told of both of its ends.

    From the root port down, ports alternate: one that ends a link downwards, a switch's upstream port, one of its
    downstream ports, and so on.
    """
    above = host.tree.parents(bus)
    pcie = host.pcie(bus) if len(above) % 2 == 1 else None
    return PciDevice(bus, "bridge", next(iter(above), None), host.device_id(bus), pcie, host.numa(bus))


def _switches(host: Host) -> Iterator[PciDevice]:
    for bus in host.tree.chains:
        device = host.device_id(bus)
        if device in NVSWITCHES:
            parent = next(iter(host.tree.parents(bus)), None)
            yield PciDevice(bus, "nvswitch", parent, device, numa=host.numa(bus))


def _numa_nodes(host: Host) -> Iterator[NumaNode]:
    for name in host.names(NODES):
        if re.fullmatch(r"node\d{1,4}", name):
            distances = host.texts.get(f"{NODES}/{name}/distance", "").split()
            cpus = host.texts.get(f"{NODES}/{name}/cpulist")
            yield NumaNode(int(name[4:]), cpus, distances=tuple(int(d) for d in distances if d.isdigit()))


def _redirects(host: Host, gpus: list[str], bridges: set[str]) -> Iterator[Oddity]:
    """Ports of switches above GPUs that send traffic between peers through the root; the root port has no choice."""
    for bridge in sorted(bridges):
        inside = len(host.tree.parents(bridge)) > 0
        if inside and host.acs.get(bridge, 0) & ACS_REDIRECT and any(bridge in host.tree.parents(g) for g in gpus):
            yield Oddity("acs-redirect", bridge, f"ACS control {host.acs[bridge]:#06x}", SOURCE)


def _translations(host: Host, gpus: list[str]) -> Iterator[Oddity]:
    for bus in gpus:
        kind = host.attribute(bus, "iommu_group/type")
        if kind in ("DMA", "DMA-FQ"):
            yield Oddity("iommu-translates", bus, f"IOMMU group type {kind}", SOURCE)


def _gpudirect(host: Host) -> Iterator[Oddity]:
    text = why_not_direct(host.names(MODULES), host.texts.get(DRIVER), host.texts.get(KERNEL))
    if text is not None:
        yield Oddity("gpudirect-off", "host", text, SOURCE)
