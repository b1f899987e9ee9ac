"""Asks NVML, through nvidia-ml-py, for everything that a verdict on links rests on. Runs in the child process.

What concerns all GPUs comes first, then GPU by GPU, then pair by pair: of a machine on which a call hangs, as much as
possible has been told by then. Each call is announced, so that the one that hangs has a name.

Source: NVML API Reference 13; nvidia-ml-py 13.615; NCCL 2.30 ``src/graph/xml.cc`` for what NCCL asks of each link.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from wsync.topo.live.records import Answer, Doing, Failure, Refusal, Request, Send, Value

NO_BINDING = Failure("nvidia-ml-py is not installed", "pip install 'wsync-rl[topo]', or give files instead")
REMEDIES = {
    "LIBRARY_NOT_FOUND": "install the NVIDIA driver (in a container: start it with the NVIDIA runtime), or give files",
    "DRIVER_NOT_LOADED": "load the driver: modprobe nvidia; see the kernel log if that fails",
    "LIB_RM_VERSION_MISMATCH": "the driver was updated under a running kernel module: reload it, or reboot",
    "NO_PERMISSION": "run where /dev/nvidiactl may be opened",
}
"""NVML's errors of starting, and what to do."""

SPEED, STATE, RECV_ERRORS, RECOVERIES = 164, 165, 208, 215
SPEED_OF_LINK = (*range(84, 90), *range(132, 138))
"""Older fields for the rate of link 0 to 11."""
C2C_COUNT, RECOVERY_ACTION = 170, 230
LINK_FIELDS = (SPEED, STATE, RECV_ERRORS, RECOVERIES)
LINK_QUESTIONS = (
    ("nvmlDeviceGetNvLinkCapability", 0),
    ("nvmlDeviceGetNvLinkErrorCounter", 0),
    ("nvmlDeviceGetNvLinkErrorCounter", 1),
    ("nvmlDeviceGetNvLinkErrorCounter", 2),
)
"""May the link carry peer traffic; how many replays, recoveries, CRC errors."""
P2P_CAPABILITIES = {0: "r", 1: "w", 2: "n"}
"""Read, write, NVLink."""
NUM_CPU_WORDS, NUM_NODE_WORDS = 64, 16
NODE_SCOPE = 0
OF_GPU = (
    "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetMaxPcieLinkGeneration",
    "nvmlDeviceGetCurrPcieLinkWidth",
    "nvmlDeviceGetMaxPcieLinkWidth",
    "nvmlDeviceGetPerformanceState",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetVirtualizationMode",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetRemappedRows",
    "nvmlDeviceGetNumaNodeId",
)
"""Calls that take a GPU and nothing else."""
LOST = ("GPU_IS_LOST", "GPU_NOT_FOUND")


def probe(request: Request, send: Send) -> None:
    """Ask everything; failures of single calls are told and passed over."""
    try:
        import pynvml
    except ImportError:
        send(NO_BINDING)
        return
    asker = Asker(pynvml, send)
    asker.doing("nvmlInit")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        name = asker.name_of(e)
        hint = REMEDIES.get(name, "see nvidia-smi and the kernel log, or give files")
        send(Failure(f"NVML cannot be started: {e} ({name})", hint))
        return
    _probe_all(pynvml, asker, request.skip)
    asker.ask("nvmlShutdown")


def _probe_all(nvml: Any, asker: Asker, skip: Sequence[int]) -> None:
    asker.ask("nvmlSystemGetDriverVersion")
    count = asker.ask("nvmlDeviceGetCount") or 0
    handles = {}
    for gpu in range(count):
        if gpu not in skip:
            handle = asker.handle(gpu)
            if handle is not None and _identify(asker, gpu, handle):
                handles[gpu] = handle
    for gpu, handle in handles.items():
        _probe_gpu(nvml, asker, gpu, handle)
    for a in handles:
        for b in handles:
            if a < b and b not in asker.lost:
                asker.ask("nvmlDeviceGetTopologyCommonAncestor", handles[a], handles[b], gpu=a, at=(b,))
            if a != b and b not in asker.lost:
                for cap in P2P_CAPABILITIES:
                    asker.ask("nvmlDeviceGetP2PStatus", handles[a], handles[b], cap, gpu=a, at=(b, cap))


class Asker:
    """Announces a call, makes it, tells what came of it."""

    def __init__(self, nvml: Any, send: Send) -> None:
        self.nvml = nvml
        self.lost: set[int] = set()
        prefix = "NVML_ERROR_"
        self._errors = {getattr(nvml, n): n.removeprefix(prefix) for n in dir(nvml) if n.startswith(prefix)}
        self.refused = ""
        """Why the last call was refused; empty if it was not."""
        self._send = send

    def doing(self, call: str, gpu: int = -1, at: tuple[int, ...] = ()) -> None:
        self._send(Doing(call, gpu, at))

    def name_of(self, error: Any) -> str:
        """``NOT_SUPPORTED`` of an NVMLError."""
        return self._errors.get(error.value, f"ERROR_{error.value}")

    def ask(
        self, call: str, *args: Any, gpu: int = -1, at: tuple[int, ...] = (), by: Callable[..., Any] | None = None
    ) -> Any:
        """The value, or None if the call was refused or the GPU is lost.

        Args:
            call: name of the function, and of the record.
            args: for the function.
            gpu, at: whom it concerns, for the record.
            by: the function, where the name is not that of one of nvidia-ml-py.
        """
        if gpu in self.lost:
            return None
        self.doing(call, gpu, at)
        try:
            value = (by or getattr(self.nvml, call))(*args)
            self.refused = ""
        except self.nvml.NVMLError as e:
            self.refused = self.name_of(e)
        except AttributeError:
            # An nvidia-ml-py that is older than the call.
            self.refused = "FUNCTION_NOT_FOUND"
        if not self.refused:
            self._send(Answer(call, plain(value), gpu, at))
            return value
        if self.refused in LOST and gpu >= 0:
            self.lost.add(gpu)
        self._send(Refusal(call, self.refused, gpu, at))
        return None

    def handle(self, gpu: int) -> Any:
        """The handle; only a refusal is worth telling."""
        self.doing("nvmlDeviceGetHandleByIndex", gpu)
        try:
            return self.nvml.nvmlDeviceGetHandleByIndex(gpu)
        except self.nvml.NVMLError as e:
            self._send(Refusal("nvmlDeviceGetHandleByIndex", self.name_of(e), gpu))
            return None


def plain(value: Any) -> Value:
    """What of a returned value can be told: numbers, text, and fields of structures by name."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (int, str)):
        return value
    if isinstance(value, ctypes.Structure):
        return {name: _field(getattr(value, name)) for name, *_ in value._fields_}
    return [] if value is None else [item if item is None else int(item) for item in value]


def _field(value: Any) -> int | str:
    if isinstance(value, ctypes.Array):
        return bytes(value).hex()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else int(value)


def _identify(asker: Asker, gpu: int, handle: Any) -> bool:
    """Place and name. Whether the GPU still answers."""
    for call in ("nvmlDeviceGetPciInfo", "nvmlDeviceGetName"):
        asker.ask(call, handle, gpu=gpu)
    return gpu not in asker.lost


def _probe_gpu(nvml: Any, asker: Asker, gpu: int, handle: Any) -> None:
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        # All that NVML has room for: on some boards a link that is refused stands between others that are not.
        _probe_link(nvml, asker, gpu, handle, link)
    for call in OF_GPU:
        asker.ask(call, handle, gpu=gpu)
    asker.ask("nvmlDeviceGetCpuAffinity", handle, NUM_CPU_WORDS, gpu=gpu)
    asker.ask("nvmlDeviceGetMemoryAffinity", handle, NUM_NODE_WORDS, NODE_SCOPE, gpu=gpu)
    asker.ask("fields", nvml, handle, [C2C_COUNT, RECOVERY_ACTION], gpu=gpu, by=_fields)
    _probe_fabric(nvml, asker, gpu, handle)
    kind = getattr(nvml, "c_nvmlNvlinkGetBwMode_v1_t", None)
    if kind is not None:
        asker.ask("nvmlDeviceGetNvlinkBwMode", nvml, "nvmlDeviceGetNvlinkBwMode", handle, kind, gpu=gpu, by=_filled)


def _probe_link(nvml: Any, asker: Asker, gpu: int, handle: Any, link: int) -> None:
    here: dict[str, Any] = {"gpu": gpu, "at": (link,)}
    active = asker.ask("nvmlDeviceGetNvLinkState", handle, link, **here)
    if asker.refused not in ("", "FUNCTION_NOT_FOUND"):
        # The GPU has no such link (NOT_SUPPORTED), or NVML has not (INVALID_ARGUMENT).
        return
    fields = asker.ask("NvLink fields", nvml, handle, [(f, link) for f in LINK_FIELDS], by=_fields, **here)
    if active is None and (not fields or all(value is None for value in fields)):
        return
    if fields and fields[0] is None and link < len(SPEED_OF_LINK):
        asker.ask("NvLink speed", nvml, handle, [SPEED_OF_LINK[link]], by=_fields, **here)
    for call in ("nvmlDeviceGetNvLinkRemoteDeviceType", "nvmlDeviceGetNvLinkRemotePciInfo"):
        if active != 0:
            asker.ask(call, handle, link, **here)
    for call, kind in LINK_QUESTIONS:
        asker.ask(call, handle, link, kind, gpu=gpu, at=(link, kind))


def _fields(nvml: Any, handle: Any, wanted: list[Any]) -> list[int | None]:
    """Values of fields; None for those that are refused."""
    return [_number(v) if v.nvmlReturn == 0 else None for v in nvml.nvmlDeviceGetFieldValues(handle, wanted)]


def _number(value: Any) -> int:
    """Types: double, unsigned int, unsigned long, unsigned long long, signed long long, signed int, unsigned short."""
    names = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
    kind = value.valueType if 0 <= value.valueType < len(names) else 3
    return int(getattr(value.value, names[kind]))


def _probe_fabric(nvml: Any, asker: Asker, gpu: int, handle: Any) -> None:
    """The newest structure that the driver knows."""
    for call, name in (
        ("nvmlDeviceGetGpuFabricInfoV", "c_nvmlGpuFabricInfo_v3_t"),
        ("nvmlDeviceGetGpuFabricInfoV", "c_nvmlGpuFabricInfo_v2_t"),
        ("nvmlDeviceGetGpuFabricInfo", "c_nvmlGpuFabricInfo_t"),
    ):
        kind = getattr(nvml, name, None)
        if kind is not None and asker.ask(call, nvml, call, handle, kind, gpu=gpu, by=_filled) is not None:
            return


def _filled(nvml: Any, call: str, handle: Any, kind: Any) -> Any:
    info = kind()
    getattr(nvml, call)(handle, ctypes.byref(info))
    return info
