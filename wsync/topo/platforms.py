"""Platform profiles: how many NVLinks a GPU model has, how fast, how they are joined; and which profile a machine has.

A profile is found from the product's name, from the PCI id, or from NCCL's estimates, in this order; a name given by
the caller wins over all. Without one the shape of the NVLinks decides, see `wsync.topo.shape`.

Sources: NVIDIA's data sheets of each GPU; pci.ids; NCCL 2.30 ``topo.h``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from wsync.errors import ConfigError
from wsync.topo.model import Gpu, Machine

SWITCH_COUNTS = (6, 8, 12, 18, 36)
"""Links per GPU of boards with NVSwitch: V100, A800 and H800, A100, H100 and Blackwell, Rubin."""
PAIR_COUNTS = (1, 2, 4, 6, 8, 12, 18, 36)
"""Links that a healthy pair may show: bridges (Turing 1 or 2, Ampere 4, A100 and H100 12) or two GPUs of a board."""


class Profile(msgspec.Struct, frozen=True):
    """What to expect of one GPU model.

    Attributes:
        name: for ``--platform``.
        links: NVLinks of each GPU; 0 for none, None for unknown.
        link_gbps: nominal rate of a link, each way; a healthy GPU shows this or slightly more (raw signalling).
        joined: how links may join GPUs: ``"switch"``, ``"mesh"``, ``"bridge"``, ``"none"``.
        pcie_gtps: what the GPU's own port can do.
        coherent: its memory is coherent with a CPU over C2C (Grace): PCIe distances to NICs mean nothing.
        p2p: PCIe peers may address each other (consumer drivers forbid it).
        board_sizes: GPUs of a machine or tray as sold, or empty for any number.
        names: matches of the product's name.
        devices: PCI device ids of NVIDIA (10de).
        nccl_gbps: NCCL's estimate of all links of a GPU.
        cube_mesh: boards wire eight GPUs to each other, and clouds deal parts of a board: links to GPUs of others are
            inactive.
    """

    name: str
    links: int | None
    link_gbps: float | None = None
    joined: tuple[str, ...] = ("switch", "mesh")
    pcie_gtps: float | None = None
    coherent: bool = False
    p2p: bool = True
    board_sizes: tuple[int, ...] = ()
    names: str = ""
    devices: tuple[str, ...] = ()
    nccl_gbps: tuple[float, ...] = ()
    cube_mesh: bool = False

    @property
    def soldered(self) -> bool:
        """Links come with the board: their absence is a fault, not a choice."""
        return bool(self.links) and "bridge" not in self.joined


UNKNOWN = Profile("unknown", None, joined=("switch", "mesh", "bridge", "none"))

_SXM = (1, 2, 4, 8, 16)
_NONE = ("none",)
_BRIDGE = ("bridge",)

PROFILES: tuple[Profile, ...] = (
    Profile(
        "p100-sxm2", 4, 20.0, pcie_gtps=8.0, names=r"P100-SXM2", devices=("15f9",), nccl_gbps=(72.0,), cube_mesh=True
    ),
    Profile("v100-power9", 6, 25.0, joined=("mesh", "bridge"), pcie_gtps=16.0, coherent=True),
    Profile(
        "v100-sxm",
        6,
        25.0,
        pcie_gtps=8.0,
        board_sizes=_SXM,
        names=r"V100-SXM",
        nccl_gbps=(120.0, 132.0),
        devices=("1db1", "1db5", "1db8"),
        cube_mesh=True,
    ),
    Profile("v100-pcie", 0, joined=_NONE, pcie_gtps=8.0, names=r"V100-(PCIE|S-PCIE|FHHL)", devices=("1db4", "1db6")),
    Profile("a800-sxm", 8, 25.0, pcie_gtps=16.0, board_sizes=_SXM, names=r"A800-SXM", devices=("20bd", "20f3")),
    Profile("a800-pcie", 8, 25.0, joined=_BRIDGE, pcie_gtps=16.0, names=r"A800", devices=("20f5", "20f6")),
    Profile(
        "a100-sxm",
        12,
        25.0,
        pcie_gtps=16.0,
        board_sizes=_SXM,
        names=r"A100.SXM",
        devices=("20b0", "20b2", "20b3"),
        nccl_gbps=(240.0, 252.0, 264.0),
    ),
    Profile("a100-pcie", 12, 25.0, joined=_BRIDGE, pcie_gtps=16.0, names=r"A100", devices=("20b5", "20f1")),
    Profile(
        "h800-sxm",
        8,
        25.0,
        pcie_gtps=32.0,
        board_sizes=_SXM,
        names=r"H800(?!.*PCIe)",
        devices=("2324",),
        nccl_gbps=(164.8,),
    ),
    Profile("h800-pcie", 8, 25.0, joined=_BRIDGE, pcie_gtps=32.0, names=r"H800.*PCIe", devices=("2322",)),
    Profile("gh200", 18, 25.0, pcie_gtps=32.0, coherent=True, names=r"GH200", devices=("2342", "2348")),
    Profile(
        "h100-pcie",
        12,
        25.0,
        joined=_BRIDGE,
        pcie_gtps=32.0,
        names=r"H100 (PCIe|NVL)",
        devices=("2331", "2321"),
    ),
    Profile("h200-nvl", 18, 25.0, joined=("bridge", "mesh"), pcie_gtps=32.0, names=r"H200 NVL", devices=("233b",)),
    Profile(
        "h100-sxm",
        18,
        25.0,
        pcie_gtps=32.0,
        board_sizes=_SXM,
        names=r"H100|H200|H20\b",
        nccl_gbps=(370.8,),
        devices=("2330", "2335", "2329", "2336", "2337", "2339"),
    ),
    Profile(
        "gb200",
        18,
        50.0,
        # Trays of a rack are on switches; NVL4 boards are meshes.
        joined=("switch", "mesh"),
        pcie_gtps=32.0,
        coherent=True,
        board_sizes=(1, 2, 4),
        names=r"GB200|GB300",
        devices=("2941", "31c2", "31c0", "31c1"),
        nccl_gbps=(),
    ),
    Profile(
        "b200-sxm",
        18,
        50.0,
        joined=("switch",),
        pcie_gtps=32.0,
        board_sizes=_SXM,
        names=r"B200|B300",
        nccl_gbps=(721.8,),
        devices=("2901", "3182"),
    ),
    Profile("rubin", 36, 50.0, joined=("switch",), pcie_gtps=64.0, coherent=True, names=r"\bV?R200|Rubin"),
    Profile("ampere-bridge", 4, 14.0, joined=_BRIDGE, pcie_gtps=16.0, names=r"\bA40\b|RTX A(6000|5500|5000|4500)\b"),
    Profile("a30", 4, 25.0, joined=_BRIDGE, pcie_gtps=16.0, names=r"\bA30\b", devices=("20b7",)),
    Profile("rtx-ampere", 0, joined=_NONE, pcie_gtps=16.0, names=r"RTX A(4000|2000)\b"),
    Profile(
        "rtx3090",
        4,
        14.0,
        joined=_BRIDGE,
        pcie_gtps=16.0,
        names=r"RTX 3090",
        devices=("2204", "2203"),
    ),
    Profile("rtx30", 0, joined=_NONE, pcie_gtps=16.0, p2p=False, names=r"RTX 30[5-8]0"),
    Profile("turing-bridge", 2, 25.0, joined=_BRIDGE, pcie_gtps=8.0, names=r"RTX 2080 Ti|Quadro RTX [68]000|TITAN RTX"),
    Profile("turing-single", 1, 25.0, joined=_BRIDGE, pcie_gtps=8.0, names=r"RTX 20(80|70 SUPER)|Quadro RTX 5000"),
    Profile("turing", 0, joined=_NONE, pcie_gtps=8.0, names=r"RTX 20[67]0|Quadro RTX [34]000"),
    Profile("rtx4090", 0, joined=_NONE, pcie_gtps=16.0, p2p=False, names=r"RTX 40\d\d", devices=("2684",)),
    Profile("rtx5090", 0, joined=_NONE, pcie_gtps=32.0, p2p=False, names=r"RTX 50\d\d", devices=("2b85",)),
    Profile("a10", 0, joined=_NONE, pcie_gtps=16.0, names=r"\bA10G?\b|\bA16\b|\bA2\b", devices=("2236", "2237")),
    Profile("l40s", 0, joined=_NONE, pcie_gtps=16.0, names=r"\bL40S?\b|\bL20\b", devices=("26b9", "26b5")),
    Profile("l4", 0, joined=_NONE, pcie_gtps=16.0, names=r"\bL4\b|\bL2\b", devices=("27b8",)),
    Profile("t4", 0, joined=_NONE, pcie_gtps=8.0, names=r"\bT4G?\b|\bP40?\b|\bM60\b", devices=("1eb8", "1eb4")),
    Profile("rtx-pro", 0, joined=_NONE, pcie_gtps=32.0, names=r"RTX PRO|RTX \d000 Ada"),
)
_BY_NAME = {p.name: p for p in PROFILES}
_ALIASES = {
    "p100": "p100-sxm2", "v100": "v100-sxm", "a100": "a100-sxm", "a800": "a800-sxm", "h100": "h100-sxm",
    "h200": "h100-sxm", "h20": "h100-sxm", "h800": "h800-sxm", "h100-nvl": "h100-pcie", "b200": "b200-sxm",
    "b300": "b200-sxm", "gb300": "gb200", "a10g": "a10", "l40": "l40s", "t4g": "t4", "a40": "ampere-bridge",
    "a6000": "ampere-bridge", "rtx2080ti": "turing-bridge",
}  # fmt: skip


def profile_named(name: str) -> Profile:
    """The profile of that name or alias.

    Raises:
        ConfigError: there is none; the hint lists them.
    """
    key = name.strip().lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    if key not in _BY_NAME:
        raise ConfigError(f"no platform is named {name!r}", hint="known are " + ", ".join([*_BY_NAME, *_ALIASES]))
    return _BY_NAME[key]


def find_profile(machine: Machine) -> Profile:
    """The profile that names, PCI ids and NCCL's estimates point to; `UNKNOWN` where they say nothing.

    Machines with several models take that of most GPUs. The shape of the NVLinks is not asked here, see
    `wsync.topo.shape`.
    """
    votes = [p for p in map(_profile_of, machine.gpus) if p is not None] or list(_from_nccl(machine))
    if not votes:
        return UNKNOWN
    # The order of the list decides a tie, so that the answer does not depend on sets.
    best = max(dict.fromkeys(votes), key=votes.count)
    if best.name == "v100-sxm" and machine.arch == "ppc64le":
        return _BY_NAME["v100-power9"]
    return best


def _profile_of(gpu: Gpu) -> Profile | None:
    by_name = profile_of_product(gpu.name) if gpu.name else None
    if by_name is not None:
        return by_name
    vendor, _, device = (gpu.device_id or "").partition(":")
    if vendor == "10de":
        return next((p for p in PROFILES if device in p.devices), None)
    return None


_NAME_CACHE: dict[str, Profile | None] = {}


def profile_of_product(name: str) -> Profile | None:
    """The profile of a product as ``nvidia-smi`` names it."""
    if name not in _NAME_CACHE:
        if len(_NAME_CACHE) > 1024:
            _NAME_CACHE.clear()
        _NAME_CACHE[name] = next((p for p in PROFILES if p.names and re.search(p.names, name, re.I)), None)
    return _NAME_CACHE[name]


def _from_nccl(machine: Machine) -> Iterable[Profile]:
    """From NCCL's estimate of a GPU's NVLinks, which its log prints."""
    view = machine.nccl
    if view is None:
        return
    rates = {e.rate_gbps for e in view.edges if e.kind == "NVL"}
    rates |= {p.rate_gbps for p in view.paths if p.kind == "NVL"}
    for rate in sorted(rates):
        yield from (p for p in PROFILES if rate in p.nccl_gbps)
