"""JSON: our own saved topology, and the golden configuration of Meta's GCM health checks."""

from __future__ import annotations

from typing import Any

import msgspec

from wsync.errors import ConfigError, FormatVersionError
from wsync.spec.json_text import encode_json
from wsync.topo.model import FORMAT_VERSION, Gpu, Machine, Nic, PciDevice, Pcie, Topology
from wsync.topo.parse.text import MAX_DEVICES, MAX_RATE, bus_id, speed_gtps

MAX_INDEX = 9999
"""Four digits, as the parsers of text read them."""


def encode_topology(topology: Topology) -> bytes:
    """Indented JSON."""
    return encode_json(topology)


def decode_topology(text: str, source: str) -> tuple[Machine, ...]:
    """Machines of a saved topology or of a golden configuration.

    Raises:
        FormatVersionError: saved by another version.
        ConfigError: neither of the two, or damaged.
    """
    try:
        value = msgspec.json.decode(text.encode())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{source}: not JSON, or truncated: {e}") from e
    if isinstance(value, dict) and value.get("kind") == "wsync-topology":
        return _own(value, source)
    if isinstance(value, dict) and isinstance(value.get("pci"), dict):
        return (_golden(value["pci"], source),)
    raise ConfigError(f"{source}: JSON that is neither a saved topology nor a golden configuration")


def _own(value: dict[str, Any], source: str) -> tuple[Machine, ...]:
    if value.get("format_version") != FORMAT_VERSION:
        got = value.get("format_version")
        raise FormatVersionError(f"{source}: a topology of version {got!r}, this wsync reads {FORMAT_VERSION}")
    try:
        machines = msgspec.convert(value, Topology).machines
    except (msgspec.ValidationError, RecursionError) as e:
        raise ConfigError(f"{source}: a damaged topology: {e}") from e
    for machine in machines:
        _check_values(machine, source)
    return machines


def _check_values(machine: Machine, source: str) -> None:
    """Numbers that no machine has: they would be believed, or keep the checks busy."""
    for what, items in (("GPUs", machine.gpus), ("NICs", machine.nics), ("PCIe devices", machine.pci)):
        if len(items) > MAX_DEVICES:
            raise ConfigError(f"{source}: {len(items)} {what}, allowed are {MAX_DEVICES}")
    for gpu in machine.gpus:
        _in_range(source, "a GPU's index", gpu.index, MAX_INDEX)
        for link in gpu.nvlinks or ():
            _in_range(source, f"index of a link of {gpu.label}", link.index, MAX_INDEX)
            _in_range(source, f"GB/s of a link of {gpu.label}", link.rate_gbps, MAX_RATE)
        for peer in gpu.peers or ():
            _in_range(source, f"links of {gpu.label} to {peer.target}", peer.count, MAX_INDEX)
    for nic in machine.nics:
        _in_range(source, f"Gbit/s of {nic.label}", nic.rate_gbit, MAX_RATE)
    for path in machine.paths:
        _in_range(source, f"NVLinks of {path.a} to {path.b}", path.links, MAX_INDEX)


def _in_range(source: str, what: str, value: float | None, most: float) -> None:
    if value is not None and not 0 <= value <= most:
        raise ConfigError(f"{source}: {what} is {value:g}, allowed is 0 to {most:g}")


def _golden(devices: dict[str, Any], source: str) -> Machine:
    """Source: facebookresearch/gcm, ``health_checks``' golden files: bus id to type, name, speeds allowed, width."""
    found = [(bus_id(k), v) for k, v in list(devices.items())[:MAX_DEVICES] if isinstance(v, dict)]
    of: dict[str, list[tuple[str, Pcie, str]]] = {"gpu": [], "ib": [], "net": [], "pci": []}
    for bus, entry in found:
        kind = str(entry.get("type"))
        if bus is not None and kind in of:
            of[kind].append((bus, _pcie(entry), str(entry.get("dev", ""))))
    gpus = sorted(of["gpu"])
    switches = [d for d in of["pci"] if "nvswitch" in d[2]]
    return Machine(
        declared=True,
        gpus=tuple(Gpu(i, bus_id=bus, pcie=pcie) for i, (bus, pcie, _) in enumerate(gpus)),
        nics=tuple(
            Nic(name.rpartition("/")[2] or bus, bus_id=bus, pcie=pcie, link_layer=layer)
            for layer, kind in (("InfiniBand", "ib"), ("Ethernet", "net"))
            for bus, pcie, name in of[kind]
        ),
        pci=tuple(PciDevice(bus, "nvswitch", pcie=pcie) for bus, pcie, _ in switches),
        sources=(source,),
    )


def _pcie(entry: dict[str, Any]) -> Pcie:
    speeds = entry.get("link_speed")
    first = speeds[0] if isinstance(speeds, list) and speeds else speeds
    width = str(entry.get("link_width", ""))
    return Pcie(speed_gtps(str(first)), int(width) if width.isdigit() and len(width) < 4 else None)
