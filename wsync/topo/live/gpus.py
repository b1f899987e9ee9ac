"""From NVML's answers to GPUs, their NVLinks, and the pairs that may address each other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from wsync.topo.live.nvml import LOST, NUM_CPU_WORDS, P2P_CAPABILITIES
from wsync.topo.live.records import Answer, Refusal
from wsync.topo.model import Fabric, Gpu, NvLink, Oddity, P2p, Path, PathKind, Pcie
from wsync.topo.parse.text import bus_id
from wsync.topo.platforms import profile_of_product

SOURCE = "NVML"
UNNAMED_SWITCH = "fffffff:ff:ff.0"
"""What NCCL writes for a switch fabric that has no bus id."""
GTPS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
ANCESTORS: dict[int, PathKind] = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""``nvmlGpuTopologyLevel_t``; two GPUs of one board (0) have a switch between them."""
STATUSES = ("OK", "CNS", "GNS", "TNS", "DR", "NS", "U")
"""``nvmlGpuP2PStatus_t`` in the words of ``nvidia-smi topo -p2p``."""
IDLE_STATES = (5, 8, 12, 15)
FABRIC_STATES = (None, "Not Started", "In Progress", "Completed")
HEALTH = (("Bandwidth", 0, "Degraded"), ("Route Recovery", 2, "True"), ("Route Unhealthy", 4, "True"),
          ("Access Timeout Recovery", 6, "True"))  # fmt: skip
"""Name, first bit of two, and the word for 1; 2 is healthy and 0 not told."""
MISCONFIGURED = {2: "SysGuid", 3: "Chassis Serial Number", 4: "No Partition", 5: "Insufficient NVLinks",
                 6: "Incompatible GPU Firmware", 7: "Invalid Location", 8: "GPU State Invalid"}  # fmt: skip
BANDWIDTH_MODES = {1: "off", 2: "min", 3: "half", 4: "three quarters"}
"""``NVML_GPU_NVLINK_BW_MODE``; 0 is full."""
RESETS = (1, 2, 4, 6, 7)
"""Recovery actions that are resets of the GPU or the node."""


NUMBERS = {"nvmlDeviceGetCudaComputeCapability": 2, "nvmlDeviceGetMigMode": 2, "nvmlDeviceGetRemappedRows": 4}
MASKS = ("nvmlDeviceGetCpuAffinity", "nvmlDeviceGetMemoryAffinity")
FIELDS = {"fields": 2, "NvLink fields": 4, "NvLink speed": 1}
TEXTS = ("nvmlDeviceGetName", "nvmlSystemGetDriverVersion")
STRUCTURES: dict[str, dict[str, type]] = {
    "nvmlDeviceGetPciInfo": {"busId": str, "pciDeviceId": int},
    "nvmlDeviceGetNvLinkRemotePciInfo": {"busId": str},
    "nvmlDeviceGetGpuFabricInfoV": {
        "state": int,
        "status": int,
        "clusterUuid": str,
        "cliqueId": int,
        "healthMask": int,
    },
    "nvmlDeviceGetGpuFabricInfo": {"state": int, "status": int, "clusterUuid": str, "cliqueId": int},
    "nvmlDeviceGetNvlinkBwMode": {"bwMode": int},
}
"""What calls return that do not return one number: so many numbers, masks, fields that may be refused, structures."""
MAX_GPUS = 256


def _fits(answer: Answer) -> bool:
    """Whether a value is of the kind that its call returns; another version of nvidia-ml-py may differ."""
    call, value = answer.call, answer.value
    if call in NUMBERS:
        return isinstance(value, list) and len(value) == NUMBERS[call] and None not in value
    if call in MASKS:
        return isinstance(value, list) and len(value) <= NUM_CPU_WORDS and all(n is not None and n >= 0 for n in value)
    if call in FIELDS:
        return isinstance(value, list) and len(value) == FIELDS[call]
    if call in STRUCTURES:
        return isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in STRUCTURES[call].items())
    if call == "nvmlDeviceGetCount":
        return isinstance(value, int) and 0 <= value <= MAX_GPUS
    return isinstance(value, str if call in TEXTS else int)


class Board:
    """What NVML told, by GPU."""

    def __init__(self, told: list[Answer | Refusal]) -> None:
        self.values: dict[tuple[str, int, tuple[int, ...]], Any] = {}
        self.refusals: dict[tuple[str, int, tuple[int, ...]], str] = {}
        for record in told:
            if isinstance(record, Answer):
                if _fits(record):
                    self.values[record.call, record.gpu, record.at] = record.value
            else:
                self.refusals[record.call, record.gpu, record.at] = record.error
        count = self.values.get(("nvmlDeviceGetCount", -1, ()), 0)
        self.indices = range(count if isinstance(count, int) else 0)
        self.links: dict[int, tuple[Link, ...] | None] = {g: self._links(g) for g in self.indices}
        self.gpus = tuple(self._gpu(g) for g in self.indices)
        self.bus_of = {g.index: g.bus_id for g in self.gpus}

    def value(self, call: str, gpu: int, *at: int) -> Any:
        """What a call returned, or None."""
        return self.values.get((call, gpu, at))

    def errors_of(self, gpu: int) -> set[str]:
        """Names of all refusals of a GPU."""
        return {error for (_, of, _), error in self.refusals.items() if of == gpu}

    def missing_calls(self) -> list[str]:
        """Functions that this driver does not have."""
        absent = {call for (call, _, _), error in self.refusals.items() if error == "FUNCTION_NOT_FOUND"}
        return sorted({call if call.startswith("nvml") else "nvmlDeviceGetFieldValues" for call in absent})

    def _ended(self, gpu: int) -> bool:
        """Whether a call that comes after all links was answered, in whichever way."""
        return ("fields", gpu, ()) in self.values or ("fields", gpu, ()) in self.refusals

    # GPUs

    def _gpu(self, gpu: int) -> Gpu:
        pci = self.value("nvmlDeviceGetPciInfo", gpu) or {}
        device = pci.get("pciDeviceId")
        sm = self.value("nvmlDeviceGetCudaComputeCapability", gpu)
        mode = self.value("nvmlDeviceGetVirtualizationMode", gpu)
        mig = self.value("nvmlDeviceGetMigMode", gpu)
        rows = self.value("nvmlDeviceGetRemappedRows", gpu)
        own_node = self.value("nvmlDeviceGetNumaNodeId", gpu)
        c2c, recovery = self.value("fields", gpu) or (None, None)
        errors = self.errors_of(gpu)
        no_handle = ("nvmlDeviceGetHandleByIndex", gpu, ()) in self.refusals
        reset = "RESET_REQUIRED" in errors
        return Gpu(
            gpu,
            # A GPU that hung in the middle of its answers has not been described.
            shown=self._ended(gpu),
            bus_id=bus_id(str(pci.get("busId", ""))),
            name=self.value("nvmlDeviceGetName", gpu),
            device_id=f"{device & 0xFFFF:04x}:{device >> 16:04x}" if isinstance(device, int) else None,
            sm=sm[0] * 10 + sm[1] if sm else None,
            numa=self._nodes(gpu),
            cpus=ranges(bits(self.value("nvmlDeviceGetCpuAffinity", gpu))),
            gpu_numa=own_node if own_node is not None and own_node >= 0 else None,
            pcie=self._pcie(gpu),
            nvlinks=self._nvlinks(gpu),
            c2c=None if c2c is None else c2c > 0,
            mig=None if mig is None else mig[0] == 1,
            virtual=None if mode is None else mode in (1, 2),
            lost=bool(errors & set(LOST)) or (no_handle and not reset and "NO_PERMISSION" not in errors),
            reset_required=True if reset or (recovery in RESETS) else None if recovery is None else False,
            remap_failed=None if rows is None else rows[3] == 1,
            fabric=self._fabric(gpu),
        )

    def _nodes(self, gpu: int) -> tuple[int, ...] | None:
        found = bits(self.value("nvmlDeviceGetMemoryAffinity", gpu))
        return found or None

    def _pcie(self, gpu: int) -> Pcie | None:
        generation, most = (self.value(f"nvmlDeviceGet{w}PcieLinkGeneration", gpu) for w in ("Curr", "Max"))
        width, max_width = (self.value(f"nvmlDeviceGet{w}PcieLinkWidth", gpu) for w in ("Curr", "Max"))
        if generation is None and width is None:
            return None
        state = self.value("nvmlDeviceGetPerformanceState", gpu)
        idle = None if state is None else state in IDLE_STATES
        return Pcie(GTPS.get(generation), width, GTPS.get(most), max_width, idle)

    def _fabric(self, gpu: int) -> Fabric | None:
        for call in ("nvmlDeviceGetGpuFabricInfoV", "nvmlDeviceGetGpuFabricInfo"):
            info = self.value(call, gpu)
            if info is not None and 0 < info["state"] < len(FABRIC_STATES):
                cluster = str(info["clusterUuid"])
                state = FABRIC_STATES[info["state"]]
                status = "Success" if info["status"] == 0 else f"error {info['status']}"
                return Fabric(
                    state,
                    status if state == "Completed" else None,
                    cluster if cluster.strip("0") else None,
                    str(info["cliqueId"]) if cluster.strip("0") else None,
                    dict(_health(info.get("healthMask", 0))),
                )
        return None

    # NVLinks

    def _links(self, gpu: int) -> tuple[Link, ...] | None:
        """Links that exist; None where the driver cannot say, or where the answers end in the middle."""
        asked = sorted(
            {at[0] for (call, of, at) in (*self.values, *self.refusals) if of == gpu and at and "NvLink" in call}
        )
        found = [Link(self, gpu, index) for index in asked]
        there = tuple(link for link in found if link.active is not None)
        if not self._ended(gpu) or (not there and any(link.unknown for link in found)):
            return None
        return there

    def _nvlinks(self, gpu: int) -> tuple[NvLink, ...] | None:
        links = self.links[gpu]
        if links is None:
            return None
        if not links:
            # Boards whose model has links and whose driver knows of none have lost them all; other models have none.
            profile = profile_of_product(self.value("nvmlDeviceGetName", gpu) or "")
            return () if profile is not None and profile.links else None
        if not any(link.active for link in links):
            return ()
        return tuple(NvLink(x.index, x.active, x.rate_gbps, x.remote if x.active else None, x.errors) for x in links)

    def paths(self) -> Iterator[Path]:
        """Both cells of every pair, as ``nvidia-smi topo -m`` counts: links to the peer, or to the switches."""
        for a in self.indices:
            for b in self.indices:
                mine, theirs = self.links[a], self.links[b]
                if a == b or mine is None or theirs is None or self.gpus[a].lost or self.gpus[b].lost:
                    # Of links that are not known nothing follows for the pair, not even that it has none.
                    continue
                count = sum(x.active is True and x.leads_to(self.bus_of[b]) for x in mine)
                count = count or min(_to_switch(mine), _to_switch(theirs))
                level = self.value("nvmlDeviceGetTopologyCommonAncestor", min(a, b), max(a, b))
                if count:
                    yield Path(f"GPU{a}", f"GPU{b}", "NV", count, SOURCE)
                elif level in ANCESTORS:
                    yield Path(f"GPU{a}", f"GPU{b}", ANCESTORS[level], 0, SOURCE)

    def p2p(self) -> Iterator[P2p]:
        """Read, write and NVLink status of every pair."""
        for (call, gpu, at), status in self.values.items():
            if call == "nvmlDeviceGetP2PStatus" and isinstance(status, int) and len(at) == 2:
                peer, cap = at
                if cap in P2P_CAPABILITIES:
                    word = STATUSES[status] if 0 <= status < len(STATUSES) else "U"
                    yield P2p(gpu, peer, word, P2P_CAPABILITIES[cap])

    # What the driver says and no tool's text does

    def oddities(self) -> Iterator[Oddity]:
        """Links that NCCL would pass over, bandwidth modes, calls that the driver lacks."""
        for gpu in self.gpus:
            subject = gpu.bus_id or gpu.label
            skipped = [(x.index, why) for x in self.links[gpu.index] or () if (why := x.skipped_by_nccl)]
            for why in dict.fromkeys(w for _, w in skipped):
                which = ", ".join(str(i) for i, w in skipped if w == why)
                yield Oddity("nccl-skips-link", subject, f"{gpu.label}, links {which}: {why}", SOURCE)
            mode = (self.value("nvmlDeviceGetNvlinkBwMode", gpu.index) or {}).get("bwMode", 0)
            if mode:
                text = f"{gpu.label}: NVLink bandwidth mode is {BANDWIDTH_MODES.get(mode, mode)}"
                yield Oddity("bandwidth-mode", subject, text, SOURCE)
        links_unknown = any(self.links[g.index] is None and not g.lost for g in self.gpus)
        for call in self.missing_calls():
            essential = links_unknown and "NvLinkState" in call
            yield Oddity("call-essential" if essential else "call-missing", "host", call, SOURCE)


class Link:
    """One NVLink as NVML tells it."""

    def __init__(self, board: Board, gpu: int, index: int) -> None:
        self.index = index
        self._board, self._gpu = board, gpu
        self._fields = board.value("NvLink fields", gpu, index) or [None] * 4

    @property
    def unknown(self) -> bool:
        """The driver has no call that would tell its state."""
        return self._refusal("nvmlDeviceGetNvLinkState") == "FUNCTION_NOT_FOUND"

    @cached_property
    def active(self) -> bool | None:
        """None for a link that the GPU does not have. A link whose traffic is disabled (3) is not active."""
        state, field = self._ask("nvmlDeviceGetNvLinkState"), self._fields[1]
        if state is None and (field is None or not self.unknown):
            return None
        return bool(state if state is not None else field in (1, 2)) and field != 3

    @property
    def rate_gbps(self) -> float | None:
        mbps = self._fields[0] or next(iter(self._ask("NvLink speed") or [None]), None)
        return mbps / 1000 if mbps and self.active else None

    @cached_property
    def to_switch(self) -> bool:
        kind = self._ask("nvmlDeviceGetNvLinkRemoteDeviceType")
        if kind is not None:
            return bool(kind == 2)
        # Old drivers name no type: what is no GPU of this machine is taken for a switch.
        buses = [(self._board.value("nvmlDeviceGetPciInfo", g) or {}).get("busId") for g in self._board.indices]
        return self.remote not in [bus_id(str(b)) for b in buses]

    @cached_property
    def remote(self) -> str | None:
        info = self._ask("nvmlDeviceGetNvLinkRemotePciInfo")
        found = bus_id(str(info["busId"])) if info else None
        if found is not None and not found.endswith("ff:ff.0") and found != "0000:00:00.0":
            return found
        return UNNAMED_SWITCH if self._ask("nvmlDeviceGetNvLinkRemoteDeviceType") == 2 else None

    @property
    def errors(self) -> dict[str, int]:
        """By the names of ``nvidia-smi nvlink -e``."""
        of = {f"{name} Errors": self._ask("nvmlDeviceGetNvLinkErrorCounter", kind)
              for kind, name in enumerate(("Replay", "Recovery", "CRC"))}  # fmt: skip
        of["Receive Errors"] = self._fields[2]
        if of["Recovery Errors"] is None:
            of["Recovery Errors"] = self._fields[3]
        return {name: count for name, count in of.items() if count is not None}

    def leads_to(self, bus: str | None) -> bool:
        kind = self._ask("nvmlDeviceGetNvLinkRemoteDeviceType")
        return kind in (None, 0) and self.remote == bus and bus is not None

    @property
    def skipped_by_nccl(self) -> str:
        """Why NCCL, which asks three calls of each link, passes over this one without a word; empty if it does not.

        Source: NCCL 2.30.7 ``src/graph/xml.cc``, ``ncclTopoGetXmlFromGpu``. From 2.31 on a switch needs no bus id.
        """
        if not self.active:
            return ""
        if self._ask("nvmlDeviceGetNvLinkCapability", 0) == 0:
            return "is active and its capability for P2P is 0"
        error = self._refusal("nvmlDeviceGetNvLinkRemotePciInfo")
        to_switch = self._ask("nvmlDeviceGetNvLinkRemoteDeviceType") == 2
        if error and error != "FUNCTION_NOT_FOUND" and not to_switch:
            return f"is active and its remote end is not told ({error})"
        return ""

    def _ask(self, call: str, *more: int) -> Any:
        at = (0,) if call == "nvmlDeviceGetNvLinkCapability" and not more else more
        return self._board.value(call, self._gpu, self.index, *at)

    def _refusal(self, call: str) -> str:
        return self._board.refusals.get((call, self._gpu, (self.index,)), "")


def _to_switch(links: tuple[Link, ...]) -> int:
    return sum(bool(x.active and x.to_switch) for x in links)


def _health(mask: int) -> Iterator[tuple[str, str]]:
    """Words of a health mask; 0 says that the driver gave none."""
    for name, shift, word in HEALTH:
        if mask >> shift & 3 == 1:
            yield name, word
    wrong = mask >> 8 & 0xF
    if wrong > 1:
        yield "Incorrect Configuration", MISCONFIGURED.get(wrong, str(wrong))


def bits(words: list[int] | None) -> tuple[int, ...] | None:
    """Positions of the bits that are set in 64-bit words; None if there are no words."""
    if words is None:
        return None
    return tuple(64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1)


def ranges(numbers: tuple[int, ...] | None) -> str | None:
    """``0-31,64-95``; empty for none, None for not known."""
    if numbers is None:
        return None
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
