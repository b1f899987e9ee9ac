"""Machines made by hand, and what the tools would print of them. Nothing here is copied from a recording.

A `Box` says where devices sit (socket, host bridge, switch) and how many NVLinks join each pair; writers turn it into
the text of ``nvidia-smi`` and NCCL, and faults are changes of the box.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

GRACE_SENTINEL = "fffffff:ff:ff.0"


@dataclass(frozen=True)
class Place:
    """Socket, host bridge of the socket, PCIe switch of the bridge, slot of the switch; -1 for no switch."""

    socket: int = 0
    bridge: int = 0
    switch: int = -1
    slot: int = 0


@dataclass(frozen=True)
class Box:
    """A machine: for each GPU and NIC its place, for each pair of GPUs its NVLinks."""

    model: str
    gpus: tuple[Place, ...]
    nv: tuple[tuple[int, ...], ...]
    nics: tuple[Place, ...] = ()
    links: int = 0
    rate_gbps: float = 25.0
    switches: tuple[int, ...] = ()
    """Links of each GPU to each NVSwitch."""
    cpus: tuple[str, ...] = ("0-31", "32-63")
    numa: tuple[int, ...] = (0, 1)
    numa_texts: tuple[str, ...] = ()
    gpu_numa: tuple[int, ...] = ()
    pcie_gen: int = 4
    arch: str = "x86_64"
    sm: int = 80
    device: str = "20b2"
    nic_gbit: tuple[int, ...] = ()
    lost_links: dict[int, frozenset[int]] = field(default_factory=dict)
    """Links of a GPU that are inactive."""

    @property
    def gpu_names(self) -> list[str]:
        return [f"GPU{i}" for i in range(len(self.gpus))]

    @property
    def nic_names(self) -> list[str]:
        return [f"mlx5_{i}" for i in range(len(self.nics))]


def distance(a: Place, b: Place) -> str:
    """What ``topo -m`` calls the way between two places."""
    if a.socket != b.socket:
        return "SYS"
    if a.bridge != b.bridge:
        return "NODE"
    if a.switch < 0 or a.switch != b.switch:
        return "PHB"
    return "PIX" if a.slot == b.slot else "PXB"


def uniform(num_gpus: int, links: int) -> tuple[tuple[int, ...], ...]:
    """The same number of links between all pairs."""
    return tuple(tuple(0 if i == j else links for j in range(num_gpus)) for i in range(num_gpus))


def cube_mesh() -> tuple[tuple[int, ...], ...]:
    """Eight GPUs, two quads of 1, 1, 2 links, and two links across."""
    nv = [[0] * 8 for _ in range(8)]
    for base in (0, 4):
        for a, b, n in ((0, 1, 1), (0, 2, 1), (0, 3, 2), (1, 2, 2), (1, 3, 1), (2, 3, 2)):
            nv[base + a][base + b] = nv[base + b][base + a] = n
    for a, n in ((0, 2), (1, 2), (2, 1), (3, 1)):
        nv[a][a + 4] = nv[a + 4][a] = n
    return tuple(map(tuple, nv))


def pairs_of(num_gpus: int, joined: tuple[tuple[int, int], ...], links: int) -> tuple[tuple[int, ...], ...]:
    """Bridges."""
    nv = [[0] * num_gpus for _ in range(num_gpus)]
    for a, b in joined:
        nv[a][b] = nv[b][a] = links
    return tuple(map(tuple, nv))


def two_sockets(num: int, per_switch: int = 2, slot: int = 0) -> tuple[Place, ...]:
    """Devices spread over two sockets, each switch on a host bridge of its own."""
    half = num // 2
    return tuple(
        Place(i // half, (i % half) // per_switch, (i % half) // per_switch, slot + i % per_switch) for i in range(num)
    )


def dgx1() -> Box:
    nics = tuple(Place(s, b, b, 0) for s in (0, 1) for b in (0, 1))
    gpus = tuple(Place(i // 4, i % 4 // 2, i % 4 // 2, 0) for i in range(8))
    return Box("Tesla V100-SXM2-32GB", gpus, cube_mesh(), nics, 6, 25.781, pcie_gen=3, sm=70, device="1db5")


def dgx2() -> Box:
    return Box("Tesla V100-SXM3-32GB", two_sockets(16), uniform(16, 6), two_sockets(8, 1), 6, 25.781, pcie_gen=3, sm=70,
               switches=(1,) * 6, device="1db8")  # fmt: skip


def a100() -> Box:
    return Box("NVIDIA A100-SXM4-80GB", two_sockets(8), uniform(8, 12), two_sockets(8, 2, 2), 12, switches=(2,) * 6)


def a100_mesh() -> Box:
    places = tuple(Place(i // 2, i % 2, 0, i % 2) for i in range(4))
    return Box("NVIDIA A100-SXM-64GB", places, uniform(4, 4), places, 12, device="20b3")


def a800() -> Box:
    export = {"model": "NVIDIA A800-SXM4-80GB", "device": "20f3"}
    return dataclasses.replace(a100(), nv=uniform(8, 8), links=8, switches=(1, 1, 1, 1, 2, 2), **export)


def h100() -> Box:
    storage = (Place(0, 7, 7, 0), Place(0, 7, 7, 1))
    return Box("NVIDIA H100 80GB HBM3", two_sockets(8, 1), uniform(8, 18), (*two_sockets(8, 1), *storage), 18, 26.562,
               switches=(4, 5, 5, 4), pcie_gen=5, sm=90, device="2330")  # fmt: skip


def h100_mesh() -> Box:
    places = tuple(Place(i // 2, i % 2, i, 0) for i in range(4))
    return Box("NVIDIA H100 80GB HBM3", places, uniform(4, 6), places, 18, 26.562, pcie_gen=5, sm=90, device="2330")


def b200() -> Box:
    return Box("NVIDIA B200", two_sockets(8), uniform(8, 18), two_sockets(8), 18, 53.125, switches=(9, 9), pcie_gen=5,
               sm=100, device="2901")  # fmt: skip


def gb200() -> Box:
    """A compute tray: every NIC is SYS to every GPU, which is how Grace looks."""
    gpus = tuple(Place(i // 2, i % 2) for i in range(4))
    return Box("NVIDIA GB200", gpus, uniform(4, 18), tuple(Place(2 + i) for i in range(4)), 18, 53.125, switches=(18,),
               cpus=("0-71", "72-143"), numa_texts=("0,3-9,11-17", "0,3-9,11-17", "1,19-25,27-33", "1,19-25,27-33"),
               gpu_numa=(2, 10, 18, 26), pcie_gen=5, arch="arm64", sm=100, device="2941")  # fmt: skip


def l40s() -> Box:
    gpus = tuple(Place(i // 2, i % 2) for i in range(4))
    return Box("NVIDIA L40S", gpus, uniform(4, 0), tuple(Place(s, 9) for s in (0, 1)), 0, sm=89, device="26b9")


def a100_bridges() -> Box:
    gpus = tuple(Place(i // 2, i % 2) for i in range(4))
    return Box("NVIDIA A100 80GB PCIe", gpus, pairs_of(4, ((0, 1), (2, 3)), 12), (), 12, device="20b5")


def rtx3090_pairs() -> Box:
    gpus = (Place(0, 0), Place(0, 0), Place(0, 1), Place(0, 1))
    return Box("NVIDIA GeForce RTX 3090", gpus, pairs_of(4, ((0, 2), (1, 3)), 4), (), 4, 14.062, sm=86, device="2204")


def h100_vm() -> Box:
    """Eight GPUs and one virtual NIC that is SYS to all of them."""
    return dataclasses.replace(h100(), nics=(Place(7),), cpus=("0-103", "104-207"))


HEALTHY = {f.__name__: f for f in (
    dgx1, dgx2, a100, a100_mesh, a800, h100, h100_mesh, b200, gb200, l40s, a100_bridges, rtx3090_pairs
)}  # fmt: skip
"""Machines without a fault; none may get a finding above INFO, whatever printed them."""


# Faults


def isolate(box: Box, gpu: int) -> Box:
    """A GPU that has lost all its NVLinks."""
    nv = tuple(tuple(0 if gpu in (i, j) else n for j, n in enumerate(row)) for i, row in enumerate(box.nv))
    return dataclasses.replace(box, nv=nv, lost_links={**box.lost_links, gpu: frozenset(range(box.links))})


def weaken(box: Box, a: int, b: int, by: int = 1) -> Box:
    """A pair with fewer links, seen from both sides."""
    nv = [list(row) for row in box.nv]
    nv[a][b] -= by
    nv[b][a] -= by
    return dataclasses.replace(box, nv=tuple(map(tuple, nv)))


def skew(box: Box, a: int, b: int, by: int = 1) -> Box:
    """A pair that one side sees with fewer links."""
    nv = [list(row) for row in box.nv]
    nv[a][b] -= by
    return dataclasses.replace(box, nv=tuple(map(tuple, nv)))


def weaken_gpu(box: Box, gpu: int, by: int = 1) -> Box:
    """A GPU with fewer links to its switch."""
    nv = tuple(
        tuple(n - by if gpu in (i, j) and i != j else n for j, n in enumerate(row)) for i, row in enumerate(box.nv)
    )
    return dataclasses.replace(box, nv=nv, lost_links={**box.lost_links, gpu: frozenset(range(by))})


def remove(box: Box, gpu: int) -> Box:
    """A GPU that fell off the bus: the driver renumbers the others; the links that led to it are inactive."""
    keep = [i for i in range(len(box.gpus)) if i != gpu]
    lost = {}
    for new, old in enumerate(keep):
        if box.nv[old][gpu] and not box.switches:
            lost[new] = frozenset(range(box.nv[old][gpu]))
    nv = tuple(tuple(box.nv[i][j] for j in keep) for i in keep)
    return dataclasses.replace(box, gpus=tuple(box.gpus[i] for i in keep), nv=nv, lost_links=lost)


def move_nics(box: Box, socket: int) -> Box:
    """Only the NICs of one socket."""
    return dataclasses.replace(box, nics=tuple(n for n in box.nics if n.socket == socket))


# Writers


LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def topo_rows(box: Box) -> list[list[str]]:
    """Header and rows of the matrix, cell by cell, without affinities."""
    names = box.gpu_names + [f"NIC{i}" for i in range(len(box.nics))]
    places = [*box.gpus, *box.nics]
    rows = [["", *names]]
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            both = i < len(box.gpus) and j < len(box.gpus)
            links = box.nv[i][j] if both else 0
            cells.append(" X " if i == j else f"NV{links}" if links else distance(places[i], places[j]))
        rows.append([name, *cells])
    return rows


def affinity(box: Box, gpu: int) -> list[str]:
    """CPU affinity, NUMA affinity, an empty cell and the GPU's NUMA id."""
    socket = box.gpus[gpu].socket
    numa = box.numa_texts[gpu] if box.numa_texts else str(box.numa[socket])
    return [box.cpus[socket], numa, "", str(box.gpu_numa[gpu]) if box.gpu_numa else "N/A"]


def topo_m(box: Box, *, legend: bool = True) -> str:
    """``nvidia-smi topo -m``."""
    head, *rows = topo_rows(box)
    lines = ["\t".join([*head, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])]
    for i, row in enumerate(rows):
        tail = affinity(box, i) if i < len(box.gpus) else ["", "", "", ""]
        lines.append("\t".join([*row, *tail]))
    text = "\n".join(lines) + "\n"
    if legend:
        text += LEGEND
        if box.nics:
            text += "\nNIC Legend:\n\n" + "".join(f"  NIC{i}: {n}\n" for i, n in enumerate(box.nic_names))
    return text


def nvlink_s(box: Box, uuid: bool = True) -> str:
    """``nvidia-smi nvlink -s``."""
    lines = []
    for i in range(len(box.gpus)):
        lines.append(f"GPU {i}: {box.model}" + (f" (UUID: GPU-{i:08d}-0000-0000-0000-000000000000)" if uuid else ""))
        lost = box.lost_links.get(i, frozenset())
        if not box.links or len(lost) == box.links:
            lines.append("NVML: Unable to retrieve NVLink information as all links are inActive")
            continue
        for link in range(box.links):
            lines.append(f"\t Link {link}: " + ("<inactive>" if link in lost else f"{box.rate_gbps:g} GB/s"))
    return "\n".join(lines) + "\n"


def nvlink_r(box: Box) -> str:
    """``nvidia-smi nvlink -R`` of a machine with switches."""
    lines = []
    for i in range(len(box.gpus)):
        lines.append(f"GPU {i}: {box.model} (UUID: GPU-0)")
        link = 0
        for switch, count in enumerate(box.switches):
            for _ in range(count):
                lines.append(f"\t Link {link}: Remote Device 00000000:{0xA0 + switch:02X}:00.0: Link {8 * i + link}")
                link += 1
    return "\n".join(lines) + "\n"


def p2p(box: Box, bad: dict[tuple[int, int], str] | None = None, default: str = "OK") -> str:
    """``nvidia-smi topo -p2p``."""
    bad = bad or {}
    n = len(box.gpus)
    lines = ["\t" + "\t".join(box.gpu_names)]
    for i in range(n):
        cells = ["X" if i == j else bad.get((i, j), bad.get((j, i), default)) for j in range(n)]
        lines.append(f" GPU{i}\t" + "\t".join(cells))
    return "\n".join(lines) + "\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"


def bus(socket: int, number: int) -> str:
    """A bus id."""
    return f"0000:{0x10 + 0x60 * min(socket, 1) + number:02x}:00.0"


def gpu_bus(box: Box, gpu: int) -> str:
    return bus(box.gpus[gpu].socket, 3 + gpu * 5)


def nic_bus(box: Box, nic: int) -> str:
    return bus(box.nics[nic].socket, 0x50 + nic)


SPEED = {3: "8.0", 4: "16.0", 5: "32.0", 6: "64.0"}


def query(box: Box, gpu: int, *, gen: int | None = None, width: int = 16, state: str = "P0", mig: str = "Disabled",
          fabric: tuple[str, str] | None = None) -> str:  # fmt: skip
    """The block of one GPU of ``nvidia-smi -q``, as far as anything of it is read."""
    lines = [
        f"GPU 0000{gpu_bus(box, gpu)}",
        f"    Product Name                          : {box.model}",
        "    MIG Mode",
        f"        Current                           : {mig}",
        f"        Pending                           : {mig}",
        "    GPU Virtualization Mode",
        "        Virtualization Mode               : None",
        "    PCI",
        f"        Device Id                         : 0x{box.device.upper()}10DE",
        f"        Bus Id                            : 0000{gpu_bus(box, gpu)}",
        "        GPU Link Info",
        "            PCIe Generation",
        f"                Max                       : {box.pcie_gen}",
        f"                Current                   : {gen or box.pcie_gen}",
        "            Link Width",
        "                Max                       : 16x",
        f"                Current                   : {width}x",
        f"    Performance State                     : {state}",
    ]
    if fabric is not None:
        lines += ["    Fabric", f"        State                             : {fabric[0]}",
                  f"        Status                            : {fabric[1]}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def query_all(box: Box, **changes) -> str:
    """``nvidia-smi -q`` of all GPUs."""
    head = f"==============NVSMI LOG==============\n\nAttached GPUs                             : {len(box.gpus)}\n"
    return head + "".join(query(box, i, **changes) for i in range(len(box.gpus)))


def system_xml(box: Box, *, host: str | None = None, uplink: str | None = None, first_rank: int = 0) -> str:
    """NCCL's dump of the machine: a bridge per PCIe switch, GPUs with NVLinks, NICs with one port each."""
    speed = f"{SPEED[box.pcie_gen]} GT/s PCIe"
    lines = ['<system version="1">']
    places = [*box.gpus, *box.nics]
    for socket in sorted({p.socket for p in places}):
        hash_text = f' host_hash="{host}"' if host else ""
        mask = ",".join("ffffffff" if i == socket else "00000000" for i in range(3, -1, -1))
        lines.append(f'  <cpu{hash_text} numaid="{socket}" affinity="{mask}" arch="{box.arch}">')
        for group in sorted({(p.bridge, p.switch) for p in places if p.socket == socket}):
            members = [i for i, p in enumerate(places) if (p.socket, p.bridge, p.switch) == (socket, *group)]
            if group[1] >= 0:
                bridge = f"00{socket:02x}:f{group[0]}:{group[1]:02x}.0"
                lines.append(
                    f'    <pci busid="{bridge}" class="0x060400" link_speed="{uplink or speed}" link_width="16">'
                )
            for i in members:
                lines += _xml_gpu(box, i, speed, first_rank) if i < len(box.gpus) else _xml_nic(box, i, speed)
            if group[1] >= 0:
                lines.append("    </pci>")
        lines.append("  </cpu>")
    return "\n".join([*lines, "</system>"]) + "\n"


def _xml_gpu(box: Box, gpu: int, speed: str, first_rank: int) -> list[str]:
    head = f'<pci busid="{gpu_bus(box, gpu)}" class="0x030200" vendor="0x10de" device="0x{box.device}"'
    lines = [f'      {head} link_speed="{speed}" link_width="16">',
             f'        <gpu dev="{gpu}" sm="{box.sm}" rank="{first_rank + gpu}" gdr="1">']  # fmt: skip
    lost = len(box.lost_links.get(gpu, ()))
    if box.switches and lost < box.links:
        for switch, count in enumerate(box.switches):
            target = GRACE_SENTINEL if box.arch == "arm64" else f"0000:{0xE0 + switch:02x}:00.0"
            missing = lost if switch == 0 else 0
            lines.append(f'          <nvlink target="{target}" count="{count - missing}" tclass="0x068000"/>')
    elif not box.switches:
        for peer, count in enumerate(box.nv[gpu]):
            if count:
                lines.append(f'          <nvlink target="{gpu_bus(box, peer)}" count="{count}" tclass="0x030200"/>')
    if box.arch == "arm64":
        lines.append('          <c2c bw="44712" count="5"/>')
    return [*lines, "        </gpu>", "      </pci>"]


def _xml_nic(box: Box, device: int, speed: str) -> list[str]:
    nic = device - len(box.gpus)
    rate = box.nic_gbit[nic] if box.nic_gbit else 200
    return [
        f'      <pci busid="{nic_bus(box, nic)}" class="0x020000" link_speed="{speed}" link_width="16">',
        f'        <nic><net name="mlx5_{nic}" dev="{nic}" speed="{rate}000" port="1" guid="0x{nic}" gdr="1"/></nic>',
        "      </pci>",
    ]
