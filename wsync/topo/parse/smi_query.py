"""``nvidia-smi -q``: one indented block of keys per GPU, and ``--query-gpu=name,index,pci.bus_id --format=csv``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec.structs import replace

from wsync.topo.model import Fabric, Gap, Gpu, Machine, Pcie
from wsync.topo.parse.text import MAX_DEVICES, bus_id

_GPU = re.compile(r"GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7])\s*$")
_KEY = re.compile(r"( *)(\S[^:\n]*?)\s*(?:: ?(.*?)\s*)?$")
_LOST = re.compile(r"Unable to determine the device handle for GPU\s*([0-9A-Fa-f:.]+?):? (?=\S)|GPU is lost")
_CSV = re.compile(r"\s*(?P<name>[^,]+?)\s*,\s*(?P<index>\d{1,4})\s*,\s*(?P<bus>[0-9A-Fa-f]{4,8}:[0-9A-Fa-f:.]+)\s*$")

_IDLE_STATES = {"P5", "P8", "P12", "P15"}


def looks_like_query(text: str) -> bool:
    """Whether it is an ``nvidia-smi -q`` log (or a part with a GPU's block)."""
    return "NVSMI LOG" in text or (re.search(r"^GPU [0-9A-Fa-f]{8}:", text, re.M) is not None and " : " in text)


def looks_like_csv(text: str) -> bool:
    """Whether a line is a name, an index and a bus id."""
    return any(_CSV.match(line) for line in text.splitlines()[:64])


def parse_csv(text: str, source: str) -> Machine:
    """Read ``name, index, pci.bus_id`` lines."""
    rows = [m for m in map(_CSV.match, text.splitlines()) if m]
    gpus = tuple(Gpu(int(m["index"]), name=m["name"], bus_id=bus_id(m["bus"])) for m in rows[:MAX_DEVICES])
    return Machine(gpus=gpus, sources=(source,))


def parse_query(text: str, source: str) -> Machine:
    """Read all blocks. A GPU of the count in the head that has no block is a gap; one that the driver lost is lost."""
    head, blocks = _split(text)
    gpus = [_gpu(i, bus, _flatten(lines)) for i, (bus, lines) in enumerate(blocks[:MAX_DEVICES])]
    for found in _LOST.finditer(text):
        lost = bus_id(found[1] or "")
        at = next((i for i, g in enumerate(gpus) if lost is not None and g.bus_id == lost), None)
        if at is None:
            gpus.append(Gpu(len(gpus), bus_id=lost, lost=True))
        else:
            gpus[at] = replace(gpus[at], lost=True)
    gaps = []
    attached = re.search(r"Attached GPUs\s*:\s*(\d{1,4})", head)
    if attached and int(attached[1]) > len(gpus):
        gaps.append(Gap(f"the blocks of {int(attached[1]) - len(gpus)} of {attached[1]} attached GPUs", source))
        gpus += [Gpu(i, shown=False) for i in range(len(gpus), int(attached[1]))]
    return Machine(gpus=tuple(gpus), gaps=tuple(gaps), sources=(source,))


def _split(text: str) -> tuple[str, list[tuple[str, list[str]]]]:
    head: list[str] = []
    blocks: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        found = _GPU.match(line)
        if found:
            blocks.append((found[1], []))
        elif blocks:
            blocks[-1][1].append(line)
        else:
            head.append(line)
    return "\n".join(head), blocks


def _flatten(lines: list[str]) -> dict[str, str]:
    """``{"PCI/Bus Id": "...", ...}`` from indentation."""
    return dict(_keys(lines))


def _keys(lines: list[str]) -> Iterator[tuple[str, str]]:
    stack: list[tuple[int, str]] = []
    for line in lines:
        found = _KEY.fullmatch(line.expandtabs())
        if found is None:
            continue
        depth, key, value = len(found[1]), found[2], found[3]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        if value is None:
            stack.append((depth, key))
        else:
            yield "/".join([*(name for _, name in stack), key]), value


def _gpu(index: int, bus: str, keys: dict[str, str]) -> Gpu:
    device = keys.get("PCI/Device Id", "")
    found = re.fullmatch(r"0x([0-9A-Fa-f]{4})([0-9A-Fa-f]{4})", device)
    mode = keys.get("GPU Virtualization Mode/Virtualization Mode")
    return Gpu(
        index,
        bus_id=bus_id(keys.get("PCI/Bus Id", bus)) or bus_id(bus),
        name=_known(keys.get("Product Name")),
        device_id=f"{found[2]}:{found[1]}".lower() if found else None,
        pcie=_pcie(keys),
        mig=_choice(keys.get("MIG Mode/Current"), "Enabled", "Disabled"),
        virtual=None if _known(mode) is None else mode not in ("None", "Host VGPU", "Host VSGA"),
        c2c=_choice(keys.get("GPU C2C Mode"), "Enabled", "Disabled"),
        reset_required=_choice(keys.get("GPU Reset Status/Reset Required"), "Yes", "No"),
        remap_failed=_choice(keys.get("Remapped Rows/Remapping Failure Occurred"), "Yes", "No"),
        fabric=_fabric(keys),
    )


def _known(value: str | None) -> str | None:
    return (
        None
        if value is None
        or value in ("N/A", "", "[N/A]", "Unknown Error", "Requested functionality has been deprecated")
        else value
    )


def _choice(value: str | None, yes: str, no: str) -> bool | None:
    return {yes: True, no: False}.get(value or "")


def _number(value: str | None) -> int | None:
    found = re.match(r"\d{1,3}", value or "")
    return int(found[0]) if found else None


_GTPS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}


def _pcie(keys: dict[str, str]) -> Pcie | None:
    generation, width = "PCI/GPU Link Info/PCIe Generation/", "PCI/GPU Link Info/Link Width/"
    values = [
        _number(keys.get(k)) for k in (generation + "Current", generation + "Max", width + "Current", width + "Max")
    ]
    if all(v is None for v in values):
        return None
    state = keys.get("Performance State")
    return Pcie(
        speed_gtps=_GTPS.get(values[0] or 0),
        width=values[2],
        max_speed_gtps=_GTPS.get(values[1] or 0),
        max_width=values[3],
        idle=None if state is None else state in _IDLE_STATES,
    )


def _fabric(keys: dict[str, str]) -> Fabric | None:
    of = {key.removeprefix("Fabric/"): value for key, value in keys.items() if key.startswith("Fabric/")}
    if not of:
        return None
    health = {k.removeprefix("Health/"): v for k, v in of.items() if k.startswith("Health/") and _known(v)}
    state, status, cluster, clique = (_known(of.get(n)) for n in ("State", "Status", "ClusterUUID", "CliqueId"))
    return Fabric(state, status, cluster, clique, health)
