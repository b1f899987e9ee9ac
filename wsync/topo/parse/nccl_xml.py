"""NCCL's system XML (``NCCL_TOPO_DUMP_FILE``, ``NCCL_TOPO_FILE``): CPUs, PCIe tree, GPUs with NVLinks, NICs.

A dump of a multi-node NVLink domain holds several hosts, told apart by ``host_hash``; bus ids repeat among them.
Source: NCCL 2.30 ``src/graph/xml.cc`` and ``topo.cc`` (classes, default speeds, width 0 read as 16).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from wsync.topo.model import Gpu, Machine, Nic, NumaNode, NvPeer, Oddity, PciDevice, Pcie
from wsync.topo.parse.text import MAX_DEVICES, bus_id, possible_rate, speed_gtps
from wsync.topo.parse.tree_paths import tree_paths
from wsync.topo.parse.xml_tree import Node

GPU_CLASSES = ("0x0302", "0x0300")
NIC_CLASSES = ("0x02",)
BRIDGE_CLASS = "0x0604"
SWITCH_CLASS = "0x068000"
CPU_CLASS = "0x068001"
MAX_LINKS = 1024

KNOWN_SPEEDS = frozenset(
    ("2.5 GT/s", "5 GT/s", "8 GT/s", "16 GT/s", "32 GT/s", "2.5 GT/s PCIe", "5.0 GT/s PCIe", "8.0 GT/s PCIe",
     "16.0 GT/s PCIe", "32.0 GT/s PCIe", "64.0 GT/s PCIe")
)  # fmt: skip
"""``kvDictPciGen`` of NCCL 2.30.7 ``src/graph/topo.cc``; any other text becomes Gen3 without a word."""


@dataclass
class _Host:
    """What is being collected of one host."""

    source: str
    name: str | None
    arch: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    pci: list[PciDevice] = field(default_factory=list)
    numa_nodes: list[NumaNode] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    dumped: bool = False
    """NCCL wrote it: devices have ``<gpu>`` or ``<nic>`` children, which nobody writes by hand."""

    def odd(self, kind: str, subject: str, text: str) -> None:
        self.oddities.append(Oddity(kind, subject, text, self.source))


class _Slot(NamedTuple):
    """Where a device sits."""

    bus: str | None
    parent: str | None
    numa: tuple[int, ...] | None
    device: str | None
    pcie: Pcie | None


def parse_system(root: Node, source: str) -> tuple[Machine, ...]:
    """One machine per host of a ``<system>``."""
    hosts: dict[str | None, _Host] = {}
    for cpu in root.all("cpu"):
        name = cpu.get("host_hash")
        _read_cpu(cpu, hosts.setdefault(name, _Host(source, name)))
    if len(hosts) == 1:
        # One host's hash says nothing to a reader, and would keep it apart from its other files.
        next(iter(hosts.values())).name = None
    return tuple(_machine(h) for h in hosts.values())


def _machine(host: _Host) -> Machine:
    order = host.gpus if host.dumped else sorted(host.gpus, key=lambda g: g.bus_id or "")
    gpus = tuple(order)
    if len({g.index for g in gpus} - {-1}) < len(gpus):
        # Without NCCL's numbers the driver's order is assumed, that of the bus ids.
        gpus = tuple(replace(g, index=i) for i, g in enumerate(order))
    _find_duplicates(host)
    return Machine(
        host=host.name,
        arch=host.arch,
        declared=not host.dumped,
        gpus=gpus,
        nics=tuple(host.nics),
        pci=tuple(host.pci),
        numa_nodes=tuple(host.numa_nodes),
        paths=tree_paths(gpus, host.nics, host.pci),
        oddities=tuple(host.oddities),
        sources=(host.source,),
    )


def _read_cpu(cpu: Node, host: _Host) -> None:
    numa = cpu.number("numaid")
    host.arch = cpu.get("arch") or host.arch
    mask = cpu.get("affinity")
    if numa is not None and numa >= 0:
        host.numa_nodes.append(NumaNode(numa, mask=mask))
    elif numa is not None:
        host.odd("numa-unknown", "host", f"numaid {numa}, line {cpu.line}")
    if mask is not None and re.fullmatch(r"[0-9A-Fa-f,]*", mask) is None:
        host.odd("affinity-malformed", f"NUMA node {numa}", mask[:200])
    near = None if numa is None else (numa,) if numa >= 0 else ()
    for child in cpu.children:
        if child.tag == "pci":
            _read_pci(child, host, None, near)
        elif child.tag == "nic":
            _read_nic(child, host, _Slot(None, None, near, None, None))


def _read_pci(node: Node, host: _Host, parent: str | None, numa: tuple[int, ...] | None) -> None:
    bus = bus_id(node.get("busid") or "")
    if bus is None:
        host.odd("bus-id-malformed", f"line {node.line}", str(node.get("busid"))[:40])
    kind = (node.get("class") or "").lower()
    slot = _Slot(bus, parent, numa, _device_id(node), _read_pcie(node, host, bus))
    if node.all("gpu") or kind.startswith(GPU_CLASSES):
        _read_gpu(node, host, slot)
    elif node.all("nic") or kind.startswith(NIC_CLASSES):
        _read_nic_device(node, host, slot)
    else:
        _read_bridge(node, host, slot, kind)


def _read_bridge(node: Node, host: _Host, slot: _Slot, kind: str) -> None:
    children = node.all("pci")
    name = "bridge" if kind.startswith(BRIDGE_CLASS) or children else "nvswitch" if kind == SWITCH_CLASS else "unknown"
    if not kind:
        host.odd("class-missing", slot.bus or f"line {node.line}", "NCCL asks the running system for the class")
    host.pci.append(PciDevice(slot.bus, name, slot.parent, slot.device, slot.pcie, slot.numa))
    for child in children:
        _read_pci(child, host, slot.bus, slot.numa)


def _device_id(node: Node) -> str | None:
    vendor, device = node.get("vendor"), node.get("device")
    if vendor is None or device is None or vendor.lower() in ("0xffff", "0x0000"):
        return None
    return f"{vendor.lower().removeprefix('0x')}:{device.lower().removeprefix('0x')}"


def _read_pcie(node: Node, host: _Host, bus: str | None) -> Pcie | None:
    text, width = node.get("link_speed"), node.number("link_width")
    if text is None and width is None:
        return None
    where = bus or f"line {node.line}"
    if text == "":
        host.odd("speed-empty", where, 'link_speed=""')
    elif text is not None and text not in KNOWN_SPEEDS:
        host.odd("speed-unknown", where, f'link_speed="{text[:40]}", line {node.line}')
    return Pcie(speed_gtps=speed_gtps(text), width=width)


def _read_gpu(node: Node, host: _Host, slot: _Slot) -> None:
    gpu = Gpu(-1, bus_id=slot.bus, device_id=slot.device, numa=slot.numa, parent=slot.parent, pcie=slot.pcie)
    for child in node.all("gpu")[:1]:
        host.dumped = True
        dev = child.number("dev")
        peers = [_read_peer(n, host, slot.bus) for n in child.all("nvlink")]
        gpu = replace(
            gpu,
            index=dev if dev is not None and 0 <= dev < MAX_DEVICES else -1,
            sm=child.number("sm"),
            rank=child.number("rank"),
            peers=tuple(p for p in peers if p is not None),
            c2c=bool(child.all("c2c")),
        )
    host.gpus.append(gpu)


def _read_peer(link: Node, host: _Host, bus: str | None) -> NvPeer | None:
    target, count = bus_id(link.get("target") or ""), link.number("count")
    where = bus or f"line {link.line}"
    if target is None or count is None or not 0 <= count <= MAX_LINKS:
        host.odd("nvlink-malformed", where, str(link.attributes)[:200])
        return None
    if target == bus:
        host.odd("nvlink-self", where, f"{count} links of {bus} lead to {bus}")
    kind = (link.get("tclass") or "").lower()
    return NvPeer(target, count, "gpu" if kind.startswith("0x03") else "cpu" if kind == CPU_CLASS else "switch")


def _read_nic_device(node: Node, host: _Host, slot: _Slot) -> None:
    children = node.all("nic")
    if not children:
        host.nics.append(_nic(f"nic@{slot.bus}", slot))
    for nic in children:
        host.dumped = True
        _read_nic(nic, host, slot)


def _nic(label: str, slot: _Slot) -> Nic:
    return Nic(label, bus_id=slot.bus, device_id=slot.device, numa=slot.numa, parent=slot.parent, pcie=slot.pcie)


def _read_nic(node: Node, host: _Host, slot: _Slot) -> None:
    for net in node.all("net"):
        speed, gdr = net.number("speed"), net.number("gdr")
        host.nics.append(
            replace(
                _nic(net.get("name") or f"net{net.get('dev')}", slot),
                rate_gbit=possible_rate(speed / 1000) if speed is not None and abs(speed) < 1e12 else None,
                port=net.number("port"),
                gdr=None if gdr is None else gdr != 0,
            )
        )


def _find_duplicates(host: _Host) -> None:
    seen: set[str] = set()
    for bus in [g.bus_id for g in host.gpus] + [d.bus_id for d in host.pci]:
        if bus is not None and bus in seen:
            host.odd("bus-id-twice", bus, "two devices have this bus id")
        if bus is not None:
            seen.add(bus)
