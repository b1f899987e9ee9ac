"""Small files of a host: ``ibstatus``, NUMA nodes of sysfs, the kernel's command line and log, ``NCCL_IB_HCA``."""

from __future__ import annotations

import re

from wsync.topo.model import HcaList, KernelLine, Machine, Nic, NumaNode, SXid, Xid
from wsync.topo.parse.text import MAX_DEVICES, MAX_WORDS_CHARS, bus_id, expand, gbit

_IB = re.compile(r"Infiniband device '([^']{1,64})' port (\d{1,3}) status:", re.I)
_IB_KEY = re.compile(r"\s*([a-z][a-z _]*?)\s*:\s+(.+?)\s*$")
_NUMA = re.compile(r"node(\d{1,4})/(cpulist|distance):(.*)$")
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]{1,32})\): (\d{1,4})")
_CAUSE = re.compile(r"previous Xid (\d{1,4})")
_ACTION = re.compile(r"changed from 0x[0-9a-fA-F]{1,8} \([^()]{0,64}\) to 0x[0-9a-fA-F]{1,8} \(([^()]{1,64})\)")
_SXID = re.compile(
    r"nvidia-nvswitch\d{1,4}: SXid \((?:PCI:)?([0-9a-fA-F:.]{1,32})\): (\d{1,5}), (Non-fatal|Fatal)", re.I
)
_LOG = re.compile(r"NVRM: |nvidia-nvswitch|Linux version \d")
_CMDLINE = re.compile(r"^(?:(\S{1,64})[ :]+)?(?:GRUB_CMDLINE_LINUX\w*\s*[:=]|/proc/cmdline:|BOOT_IMAGE=)\s*(.*)$")
_LOGGED = re.compile(r"(?:^|[\] ])(?:Kernel c|C)ommand line:[ \t]*(\S.*)$")
_HCA = re.compile(r"NCCL_IB_HCA\s*=\s*(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"'#;]+))")
_HCA_ENTRY = re.compile(r"[\^=]{0,2}[A-Za-z][\w.\-]*(?::\d{1,3})?")


def looks_like_ibstatus(text: str) -> bool:
    """Whether a line names an InfiniBand device's port."""
    return _IB.search(text) is not None


def parse_ibstatus(text: str, source: str) -> Machine:
    """Read ports: state, rate, link layer. Port 2 of a device is called ``mlx5_0:2``."""
    nics: list[Nic] = []
    keys: dict[str, str] = {}
    name = ""

    def flush() -> None:
        if not name or len(nics) >= MAX_DEVICES:
            return
        state = keys.get("state", "").partition(":")[2].strip() or None
        physical = keys.get("phys state", "")
        up = state if state != "ACTIVE" or "LinkUp" in physical or not physical else "DOWN"
        nics.append(Nic(name, rate_gbit=gbit(keys.get("rate")), state=up, link_layer=keys.get("link_layer")))

    for line in text.splitlines():
        if len(line) > MAX_WORDS_CHARS:
            continue
        found, key = _IB.search(line), _IB_KEY.match(line)
        if found:
            flush()
            name, keys = found[1] if found[2] == "1" else f"{found[1]}:{found[2]}", {}
        elif key:
            keys[key[1]] = key[2]
    flush()
    return Machine(nics=tuple(nics), sources=(source,))


def looks_like_numa(text: str) -> bool:
    """Whether it lists sysfs files of NUMA nodes."""
    return _NUMA.search(text) is not None


def parse_numa(text: str, source: str) -> Machine:
    """Read ``.../nodeN/cpulist:`` and ``.../nodeN/distance:`` lines (``grep . /sys/devices/system/node/node*/...``)."""
    nodes: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        found = _NUMA.search(line)
        if found:
            nodes.setdefault(int(found[1]), {})[found[2]] = found[3].strip()
    return Machine(
        numa_nodes=tuple(
            NumaNode(i, cpus=n.get("cpulist"), distances=_distances(n.get("distance", ""))) for i, n in nodes.items()
        ),
        sources=(source,),
    )


def _distances(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split() if n.isdigit() and len(n) < 6)


def looks_like_kernel(text: str) -> bool:
    """Whether it has a kernel's command line, or lines that the kernel or NVIDIA's driver logged."""
    return _LOG.search(text) is not None or bool(_command_lines(text))


def parse_kernel(text: str, source: str) -> Machine:
    """Read Xids and SXids of a kernel log, command lines, and values of ``NCCL_IB_HCA`` that stand between them."""
    switches = [(bus_id(m[1] + ".0"), int(m[2]), m[3].lower() == "fatal") for m in _SXID.finditer(text)]
    return Machine(
        xids=_xids(text),
        sxids=tuple(dict.fromkeys(SXid(bus, code, fatal) for bus, code, fatal in switches if bus is not None)),
        kernel=_command_lines(text),
        hca_lists=_assignments(text),
        sources=(source,),
    )


def _xids(text: str) -> tuple[Xid, ...]:
    """Each once; of the actions that the driver asks for (Xid 154) the last of each GPU, as the earlier are past."""
    found: list[Xid] = []
    last_action: dict[str, Xid] = {}
    for line in text.splitlines():
        marks = list(_XID.finditer(line))
        for i, mark in enumerate(marks):
            end = marks[i + 1].start() if i + 1 < len(marks) else len(line)
            bus = bus_id(mark[1] + ".0")
            if bus is None:
                continue
            cause, action = _CAUSE.search(line, mark.end(), end), _ACTION.search(line, mark.end(), end)
            xid = Xid(bus, int(mark[2]), int(cause[1]) if cause else None, action[1] if action else None)
            found.append(xid)
            if xid.action is not None:
                last_action[bus] = xid
    return tuple(dict.fromkeys(x for x in found if x.action is None or last_action[x.bus_id] == x))


def _command_lines(text: str) -> tuple[KernelLine, ...]:
    """Of boot loaders' files, of kernel logs, or a whole ``/proc/cmdline``."""
    lines = text.splitlines()
    found = [KernelLine(m[2], m[1]) for m in map(_CMDLINE.match, lines) if m]
    found += [KernelLine(m[1].rstrip()) for m in map(_LOGGED.search, lines) if m]
    whole = text.strip()
    if not found and len(whole) <= MAX_WORDS_CHARS and "\n" not in whole and _is_cmdline(whole):
        found.append(KernelLine(whole))
    return tuple(dict.fromkeys(found))


def _is_cmdline(line: str) -> bool:
    words = line.split()
    return line.isascii() and {"ro", "rw", "quiet"} & set(words) != set() and any(w.startswith("root=") for w in words)


def looks_like_hca(text: str) -> bool:
    """Whether it sets ``NCCL_IB_HCA``, or has a column of that name."""
    return _HCA.search(text) is not None or re.match(r"[^\n]*\tNCCL_IB_HCA\b", text) is not None


def parse_hca(text: str, source: str) -> Machine:
    """Read values of ``NCCL_IB_HCA``: assignments, or a table with a column of that name."""
    lists = list(_assignments(text))
    rows = [line.split("\t") for line in text.splitlines()]
    if rows and "NCCL_IB_HCA" in rows[0]:
        column = rows[0].index("NCCL_IB_HCA")
        lists += [HcaList(_entries(r[column]), r[0]) for r in rows[1:] if len(r) > column and column]
    return Machine(hca_lists=tuple(lists), sources=(source,))


def _assignments(text: str) -> tuple[HcaList, ...]:
    return tuple(HcaList(_entries(m[1] or m[2] or m[3] or "")) for m in _HCA.finditer(text))


def _entries(value: str) -> tuple[str, ...]:
    parts = [p.strip() for p in value.strip().strip("\"'").split(",")]
    return tuple(p for p in parts if _HCA_ENTRY.fullmatch(p))


def cpu_count(ranges: str | None) -> int | None:
    """How many CPUs a list names; None for what is no list."""
    found = expand(ranges) if ranges else None
    return None if found is None else len(found)
