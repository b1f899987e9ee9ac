"""A fake ``/sys`` and ``/proc`` in a folder: PCIe tree, InfiniBand ports, NUMA nodes, as the kernel lays them out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import machines as m

from wsync.topo.model import KIND_RANK, Machine


@dataclass
class Port:
    """One port of an RDMA device."""

    state: str = "4: ACTIVE"
    phys_state: str = "5: LinkUp"
    rate: str = "200 Gb/sec (4X HDR)"
    link_layer: str = "InfiniBand"


@dataclass
class Interface:
    """A network interface; ``below`` is what stands between the PCI device and it (``virtio0``, a USB port)."""

    type_: int = 1
    operstate: str = "up"
    speed: str = "100000"
    below: str = ""


@dataclass
class Device:
    """A device or bridge: its place is the list of bus ids from the root port down, itself last."""

    chain: tuple[str, ...]
    root: str
    pci_class: str = "0x060400"
    vendor: str = "0x15b3"
    device: str = "0x1021"
    numa: int = 0
    speed: str = "16.0 GT/s PCIe"
    max_speed: str = "16.0 GT/s PCIe"
    width: int = 16
    max_width: int = 16
    driver: str = ""
    iommu: str = ""
    config: bytes = b""
    infiniband: dict[str, list[Port]] = field(default_factory=dict)
    interfaces: dict[str, Interface] = field(default_factory=dict)


def write_sysfs(root: Path, devices: list[Device], nodes: dict[int, str], cmdline: str = "quiet") -> Path:
    """Make the folders, files and links; bridges named in chains and not given get plain ones."""
    given = {d.chain[-1] for d in devices}
    for device in list(devices):
        for depth in range(1, len(device.chain)):
            if device.chain[depth - 1] not in given:
                given.add(device.chain[depth - 1])
                bridge = Device(device.chain[:depth], device.root, vendor="0x1000", numa=device.numa,
                                speed=device.max_speed, max_speed=device.max_speed)  # fmt: skip
                devices.append(bridge)
    links = root / "sys/bus/pci/devices"
    links.mkdir(parents=True)
    for device in devices:
        bus = device.chain[-1]
        folder = root.joinpath("sys/devices", device.root, *device.chain)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, class_=device.pci_class, vendor=device.vendor, device=device.device, numa_node=device.numa)
        _write(folder, current_link_speed=device.speed, current_link_width=device.width)
        _write(folder, max_link_speed=device.max_speed, max_link_width=device.max_width)
        (folder / "config").write_bytes(device.config or bytes(64))
        depth = len(device.chain)
        (links / bus).symlink_to("../../../devices/" + "/".join((device.root, *device.chain)))
        if device.driver:
            (folder / "driver").symlink_to("../" * (depth + 2) + f"bus/pci/drivers/{device.driver}")
        if device.iommu:
            _write(folder / "iommu_group", type=device.iommu)
        for name, ports in device.infiniband.items():
            _write_infiniband(root, folder, device, name, ports)
        for name, interface in device.interfaces.items():
            _write_interface(root, folder, device, name, interface)
    for node, cpus in nodes.items():
        distances = " ".join("10" if other == node else "20" for other in nodes)
        _write(root / f"sys/devices/system/node/node{node}", cpulist=cpus, distance=distances)
    _write(root / "proc", cmdline=f"BOOT_IMAGE=/vmlinuz {cmdline}")
    return root


def _write_infiniband(root: Path, folder: Path, device: Device, name: str, ports: list[Port]) -> None:
    own = folder / "infiniband" / name
    for i, port in enumerate(ports, 1):
        _write(own / f"ports/{i}", **dataclasses.asdict(port))
    own.mkdir(parents=True, exist_ok=True)
    (own / "device").symlink_to("../..")
    listed = root / "sys/class/infiniband"
    listed.mkdir(parents=True, exist_ok=True)
    (listed / name).symlink_to("../../devices/" + "/".join((device.root, *device.chain, "infiniband", name)))


def _write_interface(root: Path, folder: Path, device: Device, name: str, interface: Interface) -> None:
    place = folder / interface.below
    own = place / "net" / name
    texts = dataclasses.asdict(interface)
    del texts["below"]
    _write(own, **texts)
    (own / "device").symlink_to("../..")
    listed = root / "sys/class/net"
    listed.mkdir(parents=True, exist_ok=True)
    (listed / name).symlink_to("../../" + str(own.relative_to(root / "sys")))


def write_driver(root: Path, modules: tuple[str, ...], version: str, kernel: str = "6.8.0-60-generic") -> None:
    """The kernel's release, its modules, and what NVIDIA's says of itself."""
    for module in modules:
        (root / "sys/module" / module).mkdir(parents=True)
    _write(root / "proc/driver/nvidia", version=f"NVRM version: {version}  Release Build\nGCC version:  gcc 13")
    _write(root / "proc/sys/kernel", osrelease=kernel)


def _write(folder: Path, **texts: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.rstrip("_")).write_text(f"{text}\n")


def place(box: m.Box, at: m.Place, bus: str, index: int) -> tuple[str, tuple[str, ...]]:
    """Host bridge and chain of a device of a box: a switch has a second level, so that slots are switches."""
    domain = f"{0x100 * at.socket + 0x10 * (at.bridge + 1):04x}"
    root = f"pci{domain}:00"
    if at.switch < 0:
        return root, (f"{domain}:00:{index:02x}.0", bus)
    upper = (f"{domain}:00:01.0", f"{domain}:01:00.0")
    lower = (f"{domain}:02:{at.slot:02x}.0", f"{domain}:{3 + at.slot:02x}:00.0")
    return root, (*upper, *lower, f"{domain}:{0x40 + at.slot:02x}:{index & 31:02x}.0", bus)


def devices_of_box(box: m.Box) -> list[Device]:
    """GPUs and NICs of a hand-made machine."""
    speed = f"{m.SPEED[box.pcie_gen]} GT/s PCIe"
    found = []
    for i, at in enumerate(box.gpus):
        root, chain = place(box, at, m.gpu_bus(box, i), i)
        numa = box.numa[at.socket]
        found.append(Device(chain, root, "0x030200", "0x10de", f"0x{box.device}", numa, speed, speed, driver="nvidia"))
    for i, at in enumerate(box.nics):
        root, chain = place(box, at, f"0002:{0x38 + i:02x}:00.0", 8 + i)
        numa = box.numa[at.socket] if at.socket < len(box.numa) else -1
        ports = {f"mlx5_{i}": [Port(rate=f"{box.nic_gbit[i] if box.nic_gbit else 200} Gb/sec (4X)")]}
        found.append(Device(chain, root, "0x020700", "0x15b3", "0x1021", numa, speed, speed, infiniband=ports))
    return found


def nodes_of_box(box: m.Box) -> dict[int, str]:
    """NUMA nodes with CPUs."""
    sockets = {p.socket for p in box.gpus}
    return {box.numa[s]: box.cpus[s] for s in sorted(sockets)}


def devices_of_machine(machine: Machine, buses: list[str]) -> tuple[list[Device], dict[int, str]]:
    """A tree in which devices are as far from each other as a parsed matrix says, and its NUMA nodes.

    Matrices that no tree has (a NIC that is near two GPUs which are far from each other) come out different.
    """
    labels = [g.label for g in machine.gpus] + [n.label for n in machine.nics]
    ranks = {frozenset((p.a, p.b)): KIND_RANK[p.kind] for p in machine.paths if p.kind != "NV"}
    groups = [_groups(labels, ranks, KIND_RANK[kind]) for kind in ("NODE", "PHB", "PXB", "PIX")]
    numa = _numa_of_sockets(machine, groups[0])
    found = []
    for i, label in enumerate(labels):
        socket, bridge, switch, slot = (group[label] for group in groups)
        alone = list(groups[2].values()).count(switch) == 1
        gpu = i < len(machine.gpus)
        bus = buses[i] if gpu else f"0002:{i & 0xFF:02x}:00.0"
        domain = f"{bridge + 0x10:04x}"
        root = f"pci{domain}:00"
        chain: tuple[str, ...] = (f"{domain}:00:{i & 31:02x}.{i >> 5 & 7}", bus)
        if not alone:
            upper = (f"{domain}:00:{switch & 31:02x}.{switch >> 5 & 7}", f"{domain}:{switch & 0x3F:02x}:00.0")
            lower = (f"{domain}:7f:{slot & 31:02x}.{slot >> 5 & 7}", f"{domain}:{0x80 | slot & 0x3F:02x}:00.0")
            chain = (*upper, *lower, f"{domain}:ff:{i & 31:02x}.{i >> 5 & 7}", bus)
        kind = ("0x030200", "0x10de", "0x2330") if gpu else ("0x020700", "0x15b3", "0x1021")
        ports = {} if gpu else {label: [Port()]}
        found.append(
            Device(chain, root, *kind, numa[socket], driver="nvidia" if gpu else "mlx5_core", infiniband=ports)
        )
    return found, {node: str(i) for i, node in enumerate(sorted(set(numa.values())))}


def _groups(labels: list[str], ranks: dict[frozenset[str], int], limit: int) -> dict[str, int]:
    """For each device the first device that steps of at most this distance reach."""
    group = {label: i for i, label in enumerate(labels)}
    for pair, rank in ranks.items():
        if rank <= limit and len(pair) == 2:
            a, b = (group[label] for label in pair)
            group = {label: min(a, b) if i in (a, b) else i for label, i in group.items()}
    return group


def _numa_of_sockets(machine: Machine, sockets: dict[str, int]) -> dict[int, int]:
    """The node that a socket's GPUs name, unless another socket's do, too."""
    found: dict[int, int] = {}
    for gpu in machine.gpus:
        if gpu.numa and gpu.numa[0] not in found.values():
            found.setdefault(sockets[gpu.label], gpu.numa[0])
    for i in sockets.values():
        found.setdefault(i, 60 + i)
    return found


def devices_of_tree(machine: Machine) -> tuple[list[Device], dict[int, str]]:
    """The tree of an NCCL dump, with the ports that NCCL leaves out: root ports and downstream ports of switches."""
    parents = {d.bus_id: d.parent for d in machine.pci}
    nodes = {d.numa[0] if d.numa else -1 for d in (*machine.gpus, *machine.nics)}
    found, seen, given = [], set(), set()
    for device in (*machine.pci, *machine.gpus, *machine.nics):
        if device.bus_id in seen:
            found[-1].infiniband.setdefault(device.label, [_port_of(device)])
            continue
        seen.add(device.bus_id)
        above, at = [device.bus_id], device.parent
        while at is not None:
            above.append(at)
            at = parents[at]
        node = device.numa[0] if device.numa else -1
        chain: list[str] = []
        for bus in reversed(above):
            chain += [f"e{bus[1:-1]}{int(bus[-1]) ^ 7}", bus]
            if chain[-2] not in given:
                given.add(chain[-2])
                port = Device(tuple(chain[:-1]), f"pci{node + 1:04x}:00", numa=node, speed="64.0 GT/s PCIe",
                              max_speed="64.0 GT/s PCIe")  # fmt: skip
                found.insert(0, port)
        vendor, _, number = (device.device_id or "15b3:1021").partition(":")
        kind = "0x030200" if device in machine.gpus else "0x020700" if device in machine.nics else "0x060400"
        speed = f"{device.pcie.speed_gtps:.1f} GT/s PCIe" if device.pcie and device.pcie.speed_gtps else "Unknown speed"
        width = device.pcie.width or 0 if device.pcie else 0
        ports = {device.label: [_port_of(device)]} if device in machine.nics else {}
        found.append(
            Device(tuple(chain), f"pci{node + 1:04x}:00", kind, f"0x{vendor}", f"0x{number}", node, speed, speed, width,
                   width, "nvidia" if device in machine.gpus else "", infiniband=ports)
        )  # fmt: skip
    return found, {node: str(i) for i, node in enumerate(sorted(nodes))}


def _port_of(nic) -> Port:
    return Port(rate=f"{nic.rate_gbit:g} Gb/sec (4X)" if nic.rate_gbit else "")
