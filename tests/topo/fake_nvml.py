"""A fake NVML library under the real nvidia-ml-py: ``pynvml.nvmlLib = FakeLib(board, faults)``.

The wrapper does what it does with the real library: it looks symbols up, passes references and reads what was written
into them. What the library answers comes from a `Board` (`fake_boards`), made of a hand-made machine or of a parsed
recording; faults are calls that hang, crash, are missing, or find a GPU gone.

Source of layouts and numbers: nvidia-ml-py itself, whose structures are filled here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import msgspec
import pynvml as n
from fake_boards import Board, Gpu, Link, of_box, of_machine

from wsync.topo.live import nvml
from wsync.topo.live.records import Request, Send

SENTINEL = "FFFFFFFF:FF:FF.0"


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


__all__ = ["Argument", "Board", "FakeLib", "Faults", "Gpu", "Link", "install", "of_box", "of_machine", "probe"]
