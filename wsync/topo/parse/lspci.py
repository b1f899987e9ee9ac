"""``lspci -nn`` and ``lspci -vv``: devices, and the PCIe links' capability and state."""

from __future__ import annotations

import re
from dataclasses import dataclass

from wsync.topo.model import Gpu, Machine, Nic, PciDevice, Pcie
from wsync.topo.parse.text import MAX_DEVICES, bus_id

_DEVICE = re.compile(
    r"((?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ([^:\[]+?)(?: \[([0-9a-f]{4})\])?: (.*)$", re.I
)
_CAP = re.compile(r"\s*LnkCap:.*?Speed (\d+(?:\.\d+)?)GT/s[^,]*, Width x(\d{1,2})")
_STA = re.compile(r"\s*LnkSta:.*?Speed (\d+(?:\.\d+)?)GT/s[^,]*, Width x(\d{1,2})")
_ID = re.compile(r"\[([0-9a-f]{4}:[0-9a-f]{4})\]")
_GPU_WORDS = ("3D controller", "VGA compatible controller", "Display controller")
_NIC_WORDS = ("Infiniband controller", "Ethernet controller", "Network controller")
NVSWITCHES = ("10de:1ac2", "10de:1af1", "10de:22a3")
"""PCI ids of NVSwitch of V100 (DGX-2), A100 and H100 boards. Source: pci.ids."""


@dataclass
class _Found:
    bus: str | None
    word: str
    text: str
    cap: tuple[float, int] | None = None
    state: tuple[float, int] | None = None


def looks_like_lspci(text: str) -> bool:
    """Whether it has a device's line or a link's state."""
    return any(_DEVICE.match(line) or _CAP.match(line) or _STA.match(line) for line in text.splitlines())


def parse_lspci(text: str, source: str) -> Machine:
    """Read GPUs, network devices and NVSwitches; a link's state without a device's line is of an unknown device."""
    found: list[_Found] = []
    for line in text.splitlines():
        device, cap, state = _DEVICE.match(line), _CAP.match(line), _STA.match(line)
        if device and len(found) < MAX_DEVICES:
            found.append(_Found(bus_id(device[1]), device[2], device[4]))
        elif (cap or state) and not found:
            found.append(_Found(None, "", ""))
        if cap:
            found[-1].cap = (float(cap[1]), int(cap[2]))
        if state:
            found[-1].state = (float(state[1]), int(state[2]))
    gpus = sorted((f for f in found if f.word in _GPU_WORDS and "NVIDIA" in f.text), key=lambda f: f.bus or "")
    nics = [f for f in found if f.word in _NIC_WORDS]
    others = [f for f in found if f.word not in _GPU_WORDS + _NIC_WORDS]
    return Machine(
        gpus=tuple(_gpu(i, f) for i, f in enumerate(gpus)),
        nics=tuple(_nic(f) for f in nics),
        pci=tuple(d for d in map(_other, others) if d is not None),
        sources=(source,),
    )


def _device_id(found: _Found) -> str | None:
    match = _ID.search(found.text)
    return match[1].lower() if match else None


def _pcie(found: _Found) -> Pcie | None:
    if found.cap is None and found.state is None:
        return None
    speed, width = found.state or (None, None)
    max_speed, max_width = found.cap or (None, None)
    return Pcie(speed, width, max_speed, max_width)


def _gpu(index: int, found: _Found) -> Gpu:
    name = re.search(r"\[(?!10de:)([^\]]+)\]", found.text)
    return Gpu(index, bus_id=found.bus, name=name[1] if name else None, device_id=_device_id(found), pcie=_pcie(found))


def _nic(found: _Found) -> Nic:
    virtual = "Virtual Function" in found.text or None
    layer = "InfiniBand" if found.word.startswith("Infiniband") else None
    label = f"nic@{found.bus}"
    return Nic(label, None, found.bus, _device_id(found), None, None, layer, pcie=_pcie(found), virtual=virtual)


def _other(found: _Found) -> PciDevice | None:
    device, pcie = _device_id(found), _pcie(found)
    if device in NVSWITCHES:
        return PciDevice(found.bus, "nvswitch", device_id=device, pcie=pcie)
    if found.word == "PCI bridge":
        return PciDevice(found.bus, "bridge", device_id=device, pcie=pcie)
    return PciDevice(found.bus, "unknown", device_id=device, pcie=pcie) if pcie is not None else None
