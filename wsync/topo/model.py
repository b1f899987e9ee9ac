"""One model of a machine, whatever it was read from: GPUs, NICs, switches, NUMA nodes, and the paths between them.

Every fact is optional: ``None`` says that no input told it, which is not the same as zero or no. Parsers fill
fragments of a `Machine`, `wsync.topo.merge` puts the fragments of one machine together, checks read the result. Rates
are GB/s (10^9 bytes per second, one direction) in fields named ``_gbps``, Gbit/s in ``_gbit``, GT/s per lane in
``_gtps``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FORMAT_VERSION = 1
"""Version of the saved topology (``wsync topo save``) and of what reports embed."""

PathKind = Literal["X", "NV", "C2C", "PIX", "PXB", "PHB", "NODE", "SYS"]
KIND_RANK: dict[str, int] = {"X": 0, "NV": 1, "C2C": 2, "PIX": 3, "PXB": 4, "PHB": 5, "NODE": 6, "SYS": 7}
"""Nearest first; the order of ``nvidia-smi topo -m``'s legend."""
LOCAL_RANK = KIND_RANK["PXB"]
"""A NIC at most this far shares a PCIe switch with the GPU: GPUDirect without the host bridge."""


class Pcie(msgspec.Struct, frozen=True, omit_defaults=True):
    """State of one PCIe port, towards the CPU.

    Attributes:
        speed_gtps, width: as trained now; a width of 0 is what hypervisors report.
        max_speed_gtps, max_width: what the device (or its slot, the smaller) can do.
        idle: the reading was taken while the device was in a low performance state.
    """

    speed_gtps: float | None = None
    width: int | None = None
    max_speed_gtps: float | None = None
    max_width: int | None = None
    idle: bool | None = None


class NvLink(msgspec.Struct, frozen=True, omit_defaults=True):
    """One NVLink of a GPU.

    Attributes:
        index: as ``nvidia-smi nvlink`` counts.
        active: False for ``<inactive>``.
        rate_gbps: signalling rate as shown.
        remote: bus id of what it leads to.
        errors: counter name to total since the driver was loaded.
    """

    index: int
    active: bool | None = None
    rate_gbps: float | None = None
    remote: str | None = None
    errors: dict[str, int] = {}


class NvPeer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Links of a GPU that lead to one place.

    Attributes:
        target: bus id; ``fffffff:ff:ff.0`` stands for a switch fabric that is not named.
        count: of links.
        kind: ``"gpu"``, ``"switch"`` or ``"cpu"``.
    """

    target: str
    count: int
    kind: str = "switch"


class Fabric(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the fabric manager says of a GPU, in the words of ``nvidia-smi -q``."""

    state: str | None = None
    status: str | None = None
    cluster: str | None = None
    clique: str | None = None
    health: dict[str, str] = {}


class Gpu(msgspec.Struct, frozen=True, omit_defaults=True):
    """One GPU.

    Attributes:
        index: as ``nvidia-smi`` counts on this host.
        shown: False for a GPU that the input names (in a header) but does not describe.
        bus_id: ``dddd:bb:dd.f``, lower case.
        name: product name.
        device_id: of PCI, ``"10de:2330"``.
        sm: compute capability times ten.
        rank: of an NCCL communicator.
        numa: NUMA nodes of the CPUs near it; ``()`` where the driver says that there is none (-1).
        cpus: the CPU list as shown; ``""`` where the cell is empty.
        gpu_numa: NUMA node that is the GPU's own memory (Grace).
        parent: bus id of the bridge above it, or ``None`` if unknown or at the root.
        nvlinks: links one by one; ``()`` for "all links are inactive".
        nvlinks_cut: the listing ended inside this GPU.
        peers: links by target (NCCL); ``()`` for a GPU that NCCL found without any.
        c2c: linked to its CPU by NVLink-C2C.
        virtual: passed through to a virtual machine.
        lost: the driver lists it and cannot talk to it.
    """

    index: int
    shown: bool = True
    bus_id: str | None = None
    name: str | None = None
    device_id: str | None = None
    sm: int | None = None
    rank: int | None = None
    numa: tuple[int, ...] | None = None
    cpus: str | None = None
    gpu_numa: int | None = None
    parent: str | None = None
    pcie: Pcie | None = None
    nvlinks: tuple[NvLink, ...] | None = None
    nvlinks_cut: bool = False
    peers: tuple[NvPeer, ...] | None = None
    c2c: bool | None = None
    mig: bool | None = None
    virtual: bool | None = None
    lost: bool = False
    reset_required: bool | None = None
    remap_failed: bool | None = None
    fabric: Fabric | None = None

    @property
    def label(self) -> str:
        """``GPU3``."""
        return f"GPU{self.index}"


class Nic(msgspec.Struct, frozen=True, omit_defaults=True):
    """One RDMA device or network port.

    Attributes:
        label: what paths call it: the device's name where known, else ``NIC3``.
        alias: ``NIC3`` of a device whose name is known from the legend.
        state: of the port, ``"ACTIVE"`` or ``"DOWN"``.
        virtual: a virtual function.
        gdr: NCCL found GPUDirect usable with it.
        rdma: False for a network interface without RDMA, which is of use for sockets only.
    """

    label: str
    alias: str | None = None
    bus_id: str | None = None
    device_id: str | None = None
    rate_gbit: float | None = None
    state: str | None = None
    link_layer: str | None = None
    numa: tuple[int, ...] | None = None
    parent: str | None = None
    pcie: Pcie | None = None
    port: int | None = None
    virtual: bool | None = None
    gdr: bool | None = None
    rdma: bool | None = None


class PciDevice(msgspec.Struct, frozen=True, omit_defaults=True):
    """A PCIe bridge, an NVSwitch, or a device of unknown kind.

    Attributes:
        kind: ``"bridge"``, ``"nvswitch"`` or ``"unknown"``.
        numa: node of the root it hangs from.
    """

    bus_id: str | None = None
    kind: str = "bridge"
    parent: str | None = None
    device_id: str | None = None
    pcie: Pcie | None = None
    numa: tuple[int, ...] | None = None


class NumaNode(msgspec.Struct, frozen=True, omit_defaults=True):
    """One NUMA node. ``cpus`` is a CPU list (``0-23,48-71``), ``mask`` NCCL's hexadecimal affinity."""

    index: int
    cpus: str | None = None
    mask: str | None = None
    distances: tuple[int, ...] = ()


class Path(msgspec.Struct, frozen=True, omit_defaults=True):
    """One cell of a matrix: how ``a`` sees ``b``. ``links`` counts NVLinks where ``kind`` is ``"NV"``."""

    a: str
    b: str
    kind: PathKind
    links: int = 0
    source: str = ""


class P2p(msgspec.Struct, frozen=True, omit_defaults=True):
    """One cell of ``topo -p2p``: capability ``r``, ``w``, ``n``, ``a``, ``p`` or ``""`` (not said); status as shown."""

    a: int
    b: int
    status: str
    capability: str = ""


class Xid(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error that the driver logged of a GPU.

    Attributes:
        cause: the earlier Xid that the line names.
        action: that the driver asks for since then (Xid 154), in its words; ``"None"`` after recovery.
    """

    bus_id: str
    code: int
    cause: int | None = None
    action: str | None = None


class SXid(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error that the driver logged of an NVSwitch."""

    bus_id: str
    code: int
    fatal: bool = False


class KernelLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A kernel's command line, with the host where the input names it."""

    text: str
    host: str | None = None


class HcaList(msgspec.Struct, frozen=True, omit_defaults=True):
    """A value of ``NCCL_IB_HCA``; ``name`` says whose (a shape, a host)."""

    entries: tuple[str, ...]
    name: str = ""


class NcclEdge(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of NCCL's drawn topology: how ``parent`` reaches ``child``, and at what rate by NCCL's estimate."""

    parent: str
    child: str
    kind: str
    rate_gbps: float


class NcclPath(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of NCCL's path table."""

    a: str
    b: str
    kind: str
    rate_gbps: float


class NcclChannels(msgspec.Struct, frozen=True, omit_defaults=True):
    """A communicator's channel counts, and the line of the log that gives them."""

    coll: int
    nvls: int
    line: int = 0


class NcclGraph(msgspec.Struct, frozen=True, omit_defaults=True):
    """One search result of NCCL. Patterns: 1 balanced tree, 3 tree, 4 ring, 5 NVLS, 6 CollNet direct."""

    graph_id: int
    pattern: int
    num_channels: int
    intra_gbps: float
    inter_gbps: float
    intra_kind: str = ""
    inter_kind: str = ""
    channels: tuple[tuple[int, ...], ...] = ()


class NcclView(msgspec.Struct, frozen=True, omit_defaults=True):
    """What NCCL itself said of the machine; ``gpudirect_off`` names the HCAs without GPUDirect RDMA."""

    edges: tuple[NcclEdge, ...] = ()
    paths: tuple[NcclPath, ...] = ()
    channels: tuple[NcclChannels, ...] = ()
    graphs: tuple[NcclGraph, ...] = ()
    warnings: tuple[str, ...] = ()
    gpudirect_off: tuple[str, ...] = ()


class Gap(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that the input should contain and does not.

    Attributes:
        what: is missing, in words.
        source: the input.
        fatal: nothing of the input could be used.
    """

    what: str
    source: str
    fatal: bool = False


class Oddity(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something strange that a parser read over; checks decide what it means.

    Attributes:
        kind: of a closed set, see `wsync.topo.checks.lint`.
        subject: a bus id, a device label or a NUMA node.
        text: what stood there.
    """

    kind: str
    subject: str
    text: str
    source: str = ""


class Machine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything known of one host.

    Attributes:
        host: its name, where an input or the caller gives it.
        arch: ``"x86_64"``, ``"arm64"``, ``"ppc64le"``.
        declared: devices come from a hand-written file (``NCCL_TOPO_FILE``), which says what its author meant.
        num_nics_hidden: NICs that the tool counted and did not show.
        sources: names of the inputs.
    """

    host: str | None = None
    arch: str | None = None
    declared: bool = False
    gpus: tuple[Gpu, ...] = ()
    nics: tuple[Nic, ...] = ()
    pci: tuple[PciDevice, ...] = ()
    numa_nodes: tuple[NumaNode, ...] = ()
    paths: tuple[Path, ...] = ()
    p2p: tuple[P2p, ...] = ()
    xids: tuple[Xid, ...] = ()
    sxids: tuple[SXid, ...] = ()
    kernel: tuple[KernelLine, ...] = ()
    hca_lists: tuple[HcaList, ...] = ()
    nccl: NcclView | None = None
    num_nics_hidden: int = 0
    gaps: tuple[Gap, ...] = ()
    oddities: tuple[Oddity, ...] = ()
    sources: tuple[str, ...] = ()


class Topology(msgspec.Struct, frozen=True):
    """The machines that were read, in the order of their inputs. This is what ``wsync topo save`` writes."""

    machines: tuple[Machine, ...]
    format_version: int = FORMAT_VERSION
    kind: Literal["wsync-topology"] = "wsync-topology"
