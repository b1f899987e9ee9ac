"""What NVML would know of a machine: made of a hand-made one, or of what a recording says of a real one."""

from __future__ import annotations

import machines as m
import msgspec

from wsync.topo.model import Machine
from wsync.topo.parse.text import expand
from wsync.topo.platforms import find_profile
from wsync.topo.shape import find_shape
from wsync.topo.view import View

LEVELS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}
STATUSES = {"OK": 0, "CNS": 1, "GNS": 2, "TNS": 3, "DR": 4, "NS": 5, "U": 6}
SWITCH_BUS = "0003:{:02x}:00.0"


class Link(msgspec.Struct):
    """One NVLink: state, rate, where it leads (``"gpu"``, ``"switch"``), error counters, capability for P2P."""

    active: bool = True
    rate_mbps: int = 25000
    remote: str = ""
    kind: str = "switch"
    errors: tuple[int, int, int] = (0, 0, 0)
    p2p: bool = True


class Gpu(msgspec.Struct):
    """What the library says of one GPU; None is NOT_SUPPORTED."""

    bus: str
    name: str = ""
    device: str = ""
    sm: int | None = None
    links: list[Link] | None = None
    cpus: list[int] | None = None
    nodes: list[int] | None = None
    own_node: int | None = None
    generation: int | None = None
    max_generation: int | None = None
    width: int | None = None
    max_width: int | None = None
    state: int = 0
    mig: int | None = None
    virtualization: int | None = None
    remap_failed: int = 0
    fabric: tuple[int, int] | None = None
    health: int = 0x1AA
    c2c: int = 0
    recovery: int = 0
    bandwidth_mode: int = 0


class Board(msgspec.Struct):
    """All GPUs, levels of common ancestors and P2P statuses by pair (``"r"``, ``"w"``, ``"n"``)."""

    gpus: list[Gpu]
    levels: list[list[int]]
    p2p: dict[str, list[list[int]]]


def of_box(box: m.Box, p2p: dict[str, list[list[int]]] | None = None) -> Board:
    """The board of a hand-made machine: links lead where its wiring says."""
    count = range(len(box.gpus))
    levels = [[0 if i == j else LEVELS[m.distance(box.gpus[i], box.gpus[j])] for j in count] for i in count]
    joined = [[bool(box.nv[i][j]) for j in count] for i in count]
    mesh = any(map(any, joined)) and not all(all(row[j] or i == j for j in count) for i, row in enumerate(joined))
    # Pairs of a cube mesh that no link joins may not address each other; cards on PCIe may.
    access = [
        [0 if joined[i][j] or not mesh or not box.model.endswith(("16GB", "32GB")) else 3 for j in count] for i in count
    ]
    nvlink = [[0 if joined[i][j] or i == j else 5 for j in count] for i in count]
    return Board([_gpu_of_box(box, i) for i in count], levels, p2p or {"r": access, "w": access, "n": nvlink})


def _gpu_of_box(box: m.Box, gpu: int) -> Gpu:
    socket = box.gpus[gpu].socket
    numa = expand(box.numa_texts[gpu] if box.numa_texts else str(box.numa[socket]))
    return Gpu(
        m.gpu_bus(box, gpu),
        box.model,
        box.device,
        box.sm,
        _links_of_box(box, gpu) if box.links else None,
        list(expand(box.cpus[socket])),
        list(numa),
        box.gpu_numa[gpu] if box.gpu_numa else None,
        *(box.pcie_gen, box.pcie_gen, 16, 16),
        mig=0,
        virtualization=0,
        fabric=(3, 0) if box.links == 18 and box.switches else None,
        c2c=5 if box.arch == "arm64" else 0,
    )


def _links_of_box(box: m.Box, gpu: int) -> list[Link]:
    rate = round(box.rate_gbps * 1000)
    lost = sorted(box.lost_links.get(gpu, ()))
    links = []
    if box.switches:
        for switch, count in enumerate(box.switches):
            remote = "" if box.arch == "arm64" else SWITCH_BUS.format(0xA0 + switch)
            links += [Link(True, rate, remote) for _ in range(count)]
        for index in lost:
            links[index] = Link(False, rate)
        return links
    for peer, count in enumerate(box.nv[gpu]):
        links += [Link(True, rate, m.gpu_bus(box, peer), "gpu") for _ in range(count)]
    return [*(Link(False, rate) for _ in range(box.links - len(links))), *links]


def of_machine(machine: Machine) -> Board:
    """The board that would have printed a parsed recording."""
    view = View(machine)
    shape = find_shape(view, find_profile(machine))
    gpus = machine.gpus
    buses = [g.bus_id or f"0000:{0x20 + i:02x}:00.0" for i, g in enumerate(gpus)]
    levels = [[0 if a is b else _level(view, a, b) for b in gpus] for a in gpus]
    p2p: dict[str, list[list[int]]] = {}
    for cell in machine.p2p:
        table = p2p.setdefault(cell.capability or "r", [[0] * len(gpus) for _ in gpus])
        table[cell.a][cell.b] = STATUSES[cell.status]
    found = []
    for i, gpu in enumerate(gpus):
        pcie = gpu.pcie
        generation = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
        fabric = gpu.fabric and (("", "Not Started", "In Progress", "Completed").index(gpu.fabric.state or ""), 0)
        found.append(
            Gpu(
                buses[i],
                gpu.name or "",
                (gpu.device_id or ":").partition(":")[2],
                gpu.sm,
                _links_of_machine(view, shape.joined, i, buses),
                _cpus(gpu.cpus),
                list(gpu.numa) if gpu.numa is not None else None,
                gpu.gpu_numa,
                generation.get(pcie.speed_gtps) if pcie else None,
                generation.get(pcie.max_speed_gtps) if pcie else None,
                pcie.width if pcie else None,
                pcie.max_width if pcie else None,
                8 if pcie and pcie.idle else 0,
                None if gpu.mig is None else int(gpu.mig),
                None if gpu.virtual is None else int(gpu.virtual),
                int(bool(gpu.remap_failed)),
                fabric,
                c2c=int(bool(gpu.c2c)),
            )
        )
    return Board(found, levels, p2p)


def _cpus(text: str | None) -> list[int] | None:
    return None if text is None else list(expand(text) or ())


def _level(view: View, a, b) -> int:
    path = view.path(a.label, b.label)
    return LEVELS.get(path.kind, 50) if path is not None else 50


def _links_of_machine(view: View, joined: str, i: int, buses: list[str]) -> list[Link] | None:
    gpu = view.gpus[i]
    rate = round(1000 * (find_profile(view.machine).link_gbps or 25))
    if gpu.nvlinks is not None:
        return [Link(bool(x.active), round((x.rate_gbps or 25) * 1000), x.remote or "") for x in gpu.nvlinks]
    if gpu.peers is not None:
        kinds = {"gpu": "gpu", "switch": "switch", "cpu": "cpu"}
        named = [(p, "" if p.target.startswith("fffffff") else p.target) for p in gpu.peers]
        return [Link(True, rate, target, kinds[p.kind]) for p, target in named for _ in range(p.count)]
    counts = view.links_between[gpu.index]
    if joined == "switch":
        return [Link(True, rate) for _ in range(max(counts.values(), default=0))]
    links = [Link(True, rate, buses[j], "gpu") for j, g in enumerate(view.gpus) for _ in range(counts.get(g.index, 0))]
    return links or None
