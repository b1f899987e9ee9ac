"""NCCL's log (``NCCL_DEBUG=INFO``, ``NCCL_DEBUG_SUBSYS=GRAPH``): drawn topology, path table, channel counts.

Source: the lines that NCCL 2.7 to 2.30 print from ``src/graph/topo.cc`` and ``src/init.cc``, as recorded in public
issues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from wsync.topo.model import Gpu, Machine, NcclChannels, NcclEdge, NcclPath, NcclView, Nic
from wsync.topo.parse.text import MAX_DEVICES, MAX_LINE_CHARS, bus_id_of_number, possible_rate

_INFO = re.compile(r"^(?:(?P<host>[\w.\-]+):\d+:\d+ )?.*?NCCL (?:INFO|WARN) (?P<rest>.*)$")
_EDGE = re.compile(r"(?P<indent>\s*)\+ (?P<kind>[A-Z0-9]{2,5})\[(?P<rate>\d+(?:\.\d+)?)\] - (?P<node>[A-Z]{3}/[\w-]+)")
_ROOT = re.compile(r"(CPU/[\w-]+)")
_PATHS = re.compile(r"((?:GPU|NET)/[\w-]+) :(.*)$")
_PATH = re.compile(r"([A-Z]{3}/[\w-]+) \((\d+)/(\d+(?:\.\d+)?)/([A-Z0-9]{2,4})\)")
_CHANNELS = re.compile(r"(\d{1,4}) coll channels,.*?(\d{1,4}) nvls channels")
_DRAWN = re.compile(r"NCCL INFO (?:\s*\+ [A-Z]{2,5}\[|CPU/|GPU/[\w-]+ :)")
_GPUDIRECT_OFF = re.compile(r"NET/IB : GPU Direct RDMA Disabled for HCA \d+ '([^'\s]{1,64})'")
_NO_P2P = "P2P is disabled between NVLINK connected GPUs"


def looks_like_nccl_log(text: str) -> bool:
    """Whether it has a drawn topology, paths or channel counts (nccl-tests' output may have other lines of NCCL's)."""
    return _CHANNELS.search(text) is not None or _NO_P2P in text or _DRAWN.search(text) is not None


def is_some_nccl_log(text: str) -> bool:
    """Whether NCCL wrote any line of it."""
    return "NCCL INFO" in text or "NCCL WARN" in text


def parse_nccl_log(text: str, source: str) -> Machine:
    """Read the lines of one host; those of other ranks of it repeat the same."""
    edges: dict[NcclEdge, None] = {}
    paths: dict[NcclPath, None] = {}
    channels: list[NcclChannels] = []
    warnings: dict[str, None] = {}
    gpudirect_off: dict[str, None] = {}
    stack: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MAX_LINE_CHARS:
            continue
        info = _INFO.match(line)
        rest = info["rest"] if info else line
        counts = _CHANNELS.search(rest)
        if counts:
            channels.append(NcclChannels(int(counts[1]), int(counts[2]), number))
        if _NO_P2P in rest:
            warnings[_NO_P2P] = None
        if info is None:
            continue
        if (disabled := _GPUDIRECT_OFF.search(rest)) is not None and len(gpudirect_off) < MAX_DEVICES:
            gpudirect_off[disabled[1]] = None
        edge = _read_edge(rest, stack)
        if edge is not None:
            edges[edge] = None
        table = _PATHS.match(rest)
        if table:
            paths.update(dict.fromkeys(_read_paths(table[1], table[2])))
    view = NcclView(tuple(edges), tuple(paths), tuple(channels), (), tuple(warnings), tuple(gpudirect_off))
    return Machine(gpus=tuple(_gpus(view)), nics=tuple(_nics(view)), nccl=view, sources=(source,))


def _read_edge(rest: str, stack: list[tuple[int, str]]) -> NcclEdge | None:
    """One line of the drawing: its indentation says below what it hangs."""
    found = _EDGE.match(rest)
    root = _ROOT.match(rest)
    if found is None:
        if root is not None:
            stack[:] = [(-1, _plain(root[1]))]
        return None
    depth, node = len(found["indent"]), _plain(found["node"])
    while stack and stack[-1][0] >= depth:
        stack.pop()
    parent = stack[-1][1] if stack else "?"
    stack.append((depth, node))
    return NcclEdge(parent, node, found["kind"], float(found["rate"]))


def _read_paths(start: str, table: str) -> Iterator[NcclPath]:
    for found in _PATH.finditer(table):
        yield NcclPath(_plain(start), _plain(found[1]), found[4], float(found[3]))


def _plain(node: str) -> str:
    """``GPU/0000:0e:00.0`` of ``GPU/E000`` and ``GPU/0-e000``; NET and NVS numbers and CPU indices stay."""
    kind, _, name = node.partition("/")
    _, _, last = name.rpartition("-")
    if kind in ("GPU", "NIC", "PCI"):
        try:
            number = int(last, 16)
        except ValueError:
            return node
        return f"{kind}/{bus_id_of_number(number)}" if number < 1 << 60 else node
    return f"{kind}/{last.lower()}"


def _names(view: NcclView, kind: str) -> list[str]:
    nodes = [e.child for e in view.edges] + [n for p in view.paths for n in (p.a, p.b)]
    return sorted({n.partition("/")[2] for n in nodes if n.startswith(kind + "/")})[:MAX_DEVICES]


def _gpus(view: NcclView) -> Iterator[Gpu]:
    for i, bus in enumerate(_names(view, "GPU")):
        yield Gpu(i, bus_id=bus)


def _nics(view: NcclView) -> Iterator[Nic]:
    rates = {e.child: e.rate_gbps for e in view.edges if e.kind == "NET"}
    for name in _names(view, "NET"):
        rate = rates.get(f"NET/{name}")
        yield Nic(f"NET/{name}", rate_gbit=possible_rate(rate * 8) if rate else None)
