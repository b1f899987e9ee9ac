"""Reads ``/sys`` and ``/proc`` for what NVML does not know: NICs, the PCIe tree, NUMA nodes, IOMMU and ACS.

Runs in a child process: an attribute of a dead device can take for ever. It only reads and tells, file by file; what
the texts mean is decided in the parent (`wsync.topo.live.devices`).

Source: Linux ``Documentation/ABI``: ``sysfs-bus-pci``, ``sysfs-class-infiniband``, ``sysfs-class-net``,
``sysfs-devices-node``.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator

from wsync.topo.live.gpudirect import DRIVER, KERNEL, MODULES
from wsync.topo.live.records import Answer, Doing, Refusal, Request, Send

PCI = "/sys/bus/pci/devices"
INFINIBAND = "/sys/class/infiniband"
NETWORK = "/sys/class/net"
NODES = "/sys/devices/system/node"
BUS_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
MAX_FILE_BYTES = 1 << 14
ACS_CAPABILITY = 0x000D
IDENTITY = ("vendor", "device", "class")
STATE = ("numa_node", "current_link_speed", "current_link_width", "max_link_speed", "max_link_width")
INTERFACE = ("type", "operstate", "speed")
PORT = ("state", "phys_state", "rate", "link_layer")


def probe(request: Request, send: Send) -> None:
    """Read everything below ``request.root``."""
    reader = Reader(request.root, send)
    for name in reader.names(NODES):
        if re.fullmatch(r"node\d+", name):
            reader.text(f"{NODES}/{name}/cpulist")
            reader.text(f"{NODES}/{name}/distance")
    reader.text("/proc/cmdline")
    reader.names(MODULES)
    reader.text(DRIVER)
    reader.text(KERNEL)
    wanted = set()
    devices = reader.names(INFINIBAND)
    for name in devices:
        wanted.update(reader.chain(f"{INFINIBAND}/{name}/device"))
        for port in reader.names(f"{INFINIBAND}/{name}/ports"):
            for attribute in PORT:
                reader.text(f"{INFINIBAND}/{name}/ports/{port}/{attribute}")
    if not devices:
        wanted.update(_probe_interfaces(reader))
    chains = {}
    for bus in reader.names(PCI):
        identity = [reader.text(f"{PCI}/{bus}/{attribute}") for attribute in IDENTITY]
        chains[bus] = reader.chain(f"{PCI}/{bus}")
        if identity[0] == "0x10de" and (identity[2] or "")[:6] in ("0x0300", "0x0302", "0x0680"):
            wanted.update(chains[bus])
    for bus in sorted(wanted & set(chains)):
        for attribute in STATE:
            reader.text(f"{PCI}/{bus}/{attribute}")
        reader.text(f"{PCI}/{bus}/iommu_group/type")
        reader.target(f"{PCI}/{bus}/driver")
        reader.target(f"{PCI}/{bus}/physfn")
        reader.access_control(f"{PCI}/{bus}/config")


def _probe_interfaces(reader: Reader) -> Iterator[str]:
    """Network interfaces with a device, which carry the traffic of hosts without RDMA; bus ids above them."""
    for name in reader.names(NETWORK):
        chain = reader.chain(f"{NETWORK}/{name}/device")
        if chain:
            for attribute in INTERFACE:
                reader.text(f"{NETWORK}/{name}/{attribute}")
        yield from chain


class Reader:
    """Announces a file, reads it, tells its content. Absent files are not worth a word."""

    def __init__(self, root: str, send: Send) -> None:
        self.root = root.rstrip("/")
        self._send = send

    def names(self, folder: str) -> list[str]:
        """Entries of a folder, sorted; also told, as lines."""
        self._send(Doing(folder))
        try:
            found = sorted(os.listdir(self.root + folder))
        except OSError as e:
            self._refused(folder, e)
            return []
        self._send(Answer(folder, "\n".join(found)))
        return found

    def text(self, path: str) -> str | None:
        """Content of a file without its end of line."""
        data = self._bytes(path, MAX_FILE_BYTES)
        if data is None:
            return None
        found = data.decode("utf-8", "replace").strip()
        self._send(Answer(path, found))
        return found

    def target(self, path: str) -> str | None:
        """What a link leads to, without the root."""
        self._send(Doing(path))
        if not os.path.islink(self.root + path):
            return None
        found = os.path.realpath(self.root + path)
        found = found.removeprefix(os.path.realpath(self.root or "/").rstrip("/"))
        self._send(Answer(path, found))
        return found

    def chain(self, path: str) -> list[str]:
        """Bus ids from the host bridge down to a device."""
        return BUS_ID.findall(self.target(path) or "")

    def access_control(self, path: str) -> None:
        """The ACS control register of a port; only root may read as far."""
        data = self._bytes(path, 4096)
        value = find_access_control(data) if data is not None else None
        if value is not None:
            self._send(Answer(path, value))

    def _bytes(self, path: str, limit: int) -> bytes | None:
        self._send(Doing(path))
        try:
            with open(self.root + path, "rb", buffering=0) as file:
                return file.read(limit)
        except OSError as e:
            self._refused(path, e)
            return None

    def _refused(self, path: str, error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            self._send(Refusal(path, errno.errorcode.get(error.errno or 0, "EIO")))


def find_access_control(config: bytes) -> int | None:
    """ACS control of a configuration space; None if it has none, or is cut before.

    Source: PCI Express Base Specification 5.0, 7.6 (list of extended capabilities from 0x100), 7.7.11 (ACS).
    """
    at, seen = 0x100, 0
    while at and at + 8 <= len(config) and seen < 64:
        (head,) = struct.unpack_from("<I", config, at)
        if head & 0xFFFF == ACS_CAPABILITY:
            (control,) = struct.unpack_from("<H", config, at + 6)
            return int(control)
        at, seen = head >> 20 & ~3, seen + 1
    return None
