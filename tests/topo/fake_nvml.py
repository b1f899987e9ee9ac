"""A fake NVML library under the real nvidia-ml-py: ``pynvml.nvmlLib = FakeLib(board, faults)``.

The wrapper does what it does with the real library: it looks symbols up, passes references and reads what was written
into them. What the library answers comes from a `Board`, made of a hand-made machine or of a parsed recording; faults
are calls that hang, crash, are missing, or find a GPU gone.

Source of layouts and numbers: nvidia-ml-py itself, whose structures are filled here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import machines as m
import msgspec
import pynvml as n

from wsync.topo.live import nvml
from wsync.topo.live.records import Request, Send
from wsync.topo.model import Machine
from wsync.topo.platforms import find_profile
from wsync.topo.shape import find_shape
from wsync.topo.view import View

LEVELS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}
STATUSES = {"OK": 0, "CNS": 1, "GNS": 2, "TNS": 3, "DR": 4, "NS": 5, "U": 6}
SWITCH_BUS = "0003:{:02x}:00.0"
SENTINEL = "FFFFFFFF:FF:FF.0"


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


class Faults(msgspec.Struct, frozen=True):
    """What goes wrong.

    Attributes:
        missing: symbols that the library does not have.
        hang, crash: symbol of the call that never returns, or kills the process; of which GPU and link (-1: any).
        lost: GPU that is gone after so many calls; -1 for none.
        refuse: symbol to the error that it returns.
        garbage: written in place of records.
    """

    missing: tuple[str, ...] = ()
    hang: tuple[str, int, int] | None = None
    crash: tuple[str, int, int] | None = None
    lost: tuple[int, int] = (-1, 0)
    refuse: dict[str, int] = {}
    garbage: str = ""
    no_binding: bool = False
    slow_ms: int = 0


class Argument(msgspec.Struct):
    """What a test passes to the probe in the child."""

    board: Board
    faults: Faults = Faults()


def probe(request: Request, send: Send) -> None:
    """Entry point of the child process in tests: the real probe over the fake library."""
    argument = msgspec.json.decode(request.argument, type=Argument)
    if argument.faults.garbage:
        os.write(int(sys.argv[1]), argument.faults.garbage.encode())
        return
    if argument.faults.no_binding:
        sys.modules["pynvml"] = None
    else:
        install(FakeLib(argument.board, argument.faults))
    nvml.probe(request, send)


def install(library: FakeLib) -> None:
    """Put a library under the wrapper, which keeps symbols of the one before."""
    n.nvmlLib = library
    n._nvmlGetFunctionPointer_cache.clear()


class FakeLib:
    """Looks like the loaded library: attributes are C functions."""

    def __init__(self, board: Board, faults: Faults | None = None) -> None:
        self.board = board
        self.faults = faults or Faults()
        self.num_calls = 0

    def __getattr__(self, symbol: str):
        function = _SYMBOLS.get(symbol)
        if function is None or symbol in self.faults.missing:
            raise AttributeError(symbol)

        def call(*args):
            return self._call(symbol, function, args)

        return call

    def _call(self, symbol, function, args):
        of_gpu = symbol.startswith("nvmlDevice") and symbol not in (
            "nvmlDeviceGetCount_v2",
            "nvmlDeviceGetHandleByIndex_v2",
        )
        gpu = _gpu_of(args[0]) if of_gpu else -1
        link = args[1] if "NvLink" in symbol and len(args) > 1 and isinstance(args[1], int) else -1
        for fault, act in ((self.faults.hang, _hang), (self.faults.crash, _crash)):
            if fault is not None and fault[0] == symbol and fault[1] in (-1, gpu) and fault[2] in (-1, link):
                act()
        time.sleep(self.faults.slow_ms / 1000)
        if symbol in self.faults.refuse:
            return self.faults.refuse[symbol]
        if gpu >= 0 and gpu == self.faults.lost[0]:
            self.num_calls += 1
            if self.num_calls > self.faults.lost[1]:
                return n.NVML_ERROR_GPU_IS_LOST
        if gpu >= 0:
            return function(self.board, gpu, *args[1:])
        return function(self.board, self.faults, *args)


def _hang() -> None:
    while True:
        time.sleep(1000)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _gpu_of(handle) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value - 1


def _put(reference, value) -> int:
    """Write into what a reference points to; None is not supported."""
    if value is None:
        return n.NVML_ERROR_NOT_SUPPORTED
    reference._obj.value = value
    return n.NVML_SUCCESS


_SYMBOLS = {}


def _symbol(function):
    _SYMBOLS[function.__name__] = function
    return function


@_symbol
def nvmlInitWithFlags(board, faults, flags):
    return n.NVML_SUCCESS


@_symbol
def nvmlShutdown(board, faults):
    return n.NVML_SUCCESS


@_symbol
def nvmlErrorString(board, faults, error):
    return f"error {error}".encode()


_SYMBOLS["nvmlErrorString"] = type("ErrorString", (), {"__call__": nvmlErrorString})


@_symbol
def nvmlSystemGetDriverVersion(board, faults, text, size):
    text.value = b"999.1"
    return n.NVML_SUCCESS


@_symbol
def nvmlDeviceGetCount_v2(board, faults, out):
    return _put(out, len(board.gpus))


@_symbol
def nvmlDeviceGetHandleByIndex_v2(board, faults, index, out):
    if faults.lost == (index.value, 0):
        return n.NVML_ERROR_UNKNOWN
    out._obj.contents = ctypes.cast(ctypes.c_void_p(index.value + 1), n.c_nvmlDevice_t).contents
    return n.NVML_SUCCESS


@_symbol
def nvmlDeviceGetName(board, gpu, text, size):
    text.value = board.gpus[gpu].name.encode()
    return n.NVML_SUCCESS if board.gpus[gpu].name else n.NVML_ERROR_NOT_SUPPORTED


@_symbol
def nvmlDeviceGetPciInfo_v3(board, gpu, out):
    info = out._obj
    info.busId = f"0000{board.gpus[gpu].bus}".upper().encode()
    device = board.gpus[gpu].device
    info.pciDeviceId = int(device, 16) << 16 | 0x10DE if device else 0
    return n.NVML_SUCCESS


@_symbol
def nvmlDeviceGetCudaComputeCapability(board, gpu, major, minor):
    sm = board.gpus[gpu].sm
    return _put(major, None if sm is None else sm // 10) or _put(minor, sm % 10)


def _simple(symbol, field):
    _SYMBOLS[symbol] = lambda board, gpu, out: _put(out, getattr(board.gpus[gpu], field))


_simple("nvmlDeviceGetCurrPcieLinkGeneration", "generation")
_simple("nvmlDeviceGetMaxPcieLinkGeneration", "max_generation")
_simple("nvmlDeviceGetCurrPcieLinkWidth", "width")
_simple("nvmlDeviceGetMaxPcieLinkWidth", "max_width")
_simple("nvmlDeviceGetPerformanceState", "state")
_simple("nvmlDeviceGetVirtualizationMode", "virtualization")
_simple("nvmlDeviceGetNumaNodeId", "own_node")


@_symbol
def nvmlDeviceGetMigMode(board, gpu, current, pending):
    return _put(current, board.gpus[gpu].mig) or _put(pending, board.gpus[gpu].mig)


@_symbol
def nvmlDeviceGetRemappedRows(board, gpu, correctable, uncorrectable, pending, failed):
    for out in (correctable, uncorrectable, pending):
        _put(out, 0)
    return _put(failed, board.gpus[gpu].remap_failed)


def _mask(numbers, num_words, out):
    if numbers is None:
        return n.NVML_ERROR_NOT_SUPPORTED
    for number in numbers:
        out._obj[number // 64] |= 1 << number % 64
    return n.NVML_SUCCESS


@_symbol
def nvmlDeviceGetCpuAffinity(board, gpu, num_words, out):
    return _mask(board.gpus[gpu].cpus, num_words, out)


@_symbol
def nvmlDeviceGetMemoryAffinity(board, gpu, num_words, out, scope):
    return _mask(board.gpus[gpu].nodes, num_words, out)


def _link(board, gpu, link):
    """The link, or why there is none: boards have room for 18, the rest is beyond what the driver knows."""
    links = board.gpus[gpu].links
    if links is None:
        return n.NVML_ERROR_NOT_SUPPORTED
    if link >= len(links):
        return n.NVML_ERROR_INVALID_ARGUMENT if link >= 18 else n.NVML_ERROR_NOT_SUPPORTED
    return links[link]


def _of_link(symbol):
    def register(function):
        def call(board, gpu, link, *rest):
            found = _link(board, gpu, link)
            return found if isinstance(found, int) else function(board, found, *rest)

        _SYMBOLS[symbol] = call
        return function

    return register


@_of_link("nvmlDeviceGetNvLinkState")
def _state(board, link, out):
    return _put(out, int(link.active))


@_of_link("nvmlDeviceGetNvLinkCapability")
def _capability(board, link, kind, out):
    return _put(out, int(link.p2p))


@_of_link("nvmlDeviceGetNvLinkRemoteDeviceType")
def _remote_type(board, link, out):
    return _put(out, {"gpu": 0, "cpu": 1, "switch": 2}[link.kind])


@_of_link("nvmlDeviceGetNvLinkRemotePciInfo_v2")
def _remote_pci(board, link, out):
    out._obj.busId = (f"0000{link.remote}" if link.remote else SENTINEL).upper().encode()
    return n.NVML_SUCCESS


@_of_link("nvmlDeviceGetNvLinkErrorCounter")
def _errors(board, link, kind, out):
    return _put(out, link.errors[kind])


@_symbol
def nvmlDeviceGetFieldValues(board, gpu, count, out):
    for value in out._obj[: count.value]:
        found = _field(board, gpu, value.fieldId, value.scopeId)
        value.nvmlReturn = n.NVML_ERROR_NOT_SUPPORTED if found is None else n.NVML_SUCCESS
        value.valueType = 1
        value.value.uiVal = found or 0
    return n.NVML_SUCCESS


def _field(board, gpu, field, link):
    if field == n.NVML_FI_DEV_C2C_LINK_COUNT:
        return board.gpus[gpu].c2c
    if field == n.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION:
        return board.gpus[gpu].recovery
    found = _link(board, gpu, link)
    if isinstance(found, int):
        return None
    if field == n.NVML_FI_DEV_NVLINK_GET_SPEED:
        return found.rate_mbps if found.active else None
    return int(found.active) if field == n.NVML_FI_DEV_NVLINK_GET_STATE else None


@_symbol
def nvmlDeviceGetTopologyCommonAncestor(board, gpu, other, out):
    return _put(out, board.levels[gpu][_gpu_of(other)])


@_symbol
def nvmlDeviceGetP2PStatus(board, gpu, other, capability, out):
    table = board.p2p.get("rwn"[capability])
    return n.NVML_ERROR_NOT_SUPPORTED if table is None else _put(out, table[gpu][_gpu_of(other)])


@_symbol
def nvmlDeviceGetGpuFabricInfoV(board, gpu, out):
    info, fabric = out._obj, board.gpus[gpu].fabric
    if info.version != n.nvmlGpuFabricInfo_v2:
        return n.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    info.state, info.status = fabric or (0, 0)
    info.healthMask = board.gpus[gpu].health
    return n.NVML_SUCCESS


@_symbol
def nvmlDeviceGetNvlinkBwMode(board, gpu, out):
    out._obj.bwMode = board.gpus[gpu].bandwidth_mode
    return n.NVML_SUCCESS


# Boards


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
    from wsync.topo.parse.text import expand

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
    from wsync.topo.parse.text import expand

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
