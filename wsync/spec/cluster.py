"""The cluster file: what the machines are made of and how fast each part is. JSON, versioned, strict.

Rates are in GB/s, 10^9 bytes per second and per direction. A node's name is what ranks report as their host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from wsync.errors import ConfigError
from wsync.spec.files import read_file, write_file
from wsync.spec.json_text import encode_json
from wsync.spec.serde import FORMAT_VERSION, check_format

MAX_RATE_GBPS = 1e6
"""A rate above this (a petabyte per second through one part) is a slip of the pen."""
MAX_COUNT = 1 << 20
"""Nodes of a group, GPUs of a node, and rails that a file may name."""
MAX_ALPHA_S = 10.0
MAX_FILE_BYTES = 64 << 20

DEFAULT_NIC_GBPS = 12.5
"""One 100 Gb/s port, the least that machines which train are sold with."""
DEFAULT_HOST_GBPS = 10.0
"""Memory copy of one socket with few channels, reads and writes counted once."""
DEFAULT_ALPHA_S = 20e-6
"""One message through a kernel's TCP stack."""


class NicPath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one GPU reaches a NIC.

    Attributes:
        gpu: index of the GPU in its node.
        path: as ``nvidia-smi topo -m`` names it: one PCIe switch, several, the host bridge, the NUMA node, the sockets.
    """

    gpu: int
    path: Literal["PIX", "PXB", "PHB", "NODE", "SYS"]


class Nic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network port.

    Attributes:
        rate_gbps: GB/s in each direction.
        rail: index of the rail (the leaf switch that ports of equal position share).
        gpus: the GPUs that reach it.
    """

    rate_gbps: float
    rail: int = 0
    gpus: tuple[NicPath, ...] = ()


class NodeGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identical nodes.

    Attributes:
        name: of the group.
        count: how many nodes.
        hosts: their names, or empty: then they are ``<group>-0``, ``<group>-1`` and so on.
        num_gpus: per node; 0 for a node whose ranks keep weights in host memory.
        hbm_gbps: memory rate of one GPU; required with GPUs.
        pcie_gbps: host to one GPU, each way; required with GPUs.
        host_gbps: memory of the whole node.
        nvlink_gbps: of one GPU, each way; required with a domain.
        nvlink_domain: GPUs that reach each other over NVLink; 0 for none. At most ``num_gpus``, or a multiple of it
            where a domain spans consecutive nodes of the group (a rack of GB200 NVL72: 4 per node, 72 per domain).
        nics: the node's ports; a node without ports exchanges nothing with others.
    """

    name: str
    count: int
    host_gbps: float
    hosts: tuple[str, ...] = ()
    num_gpus: int = 0
    hbm_gbps: float | None = None
    pcie_gbps: float | None = None
    nvlink_gbps: float | None = None
    nvlink_domain: int = 0
    nics: tuple[Nic, ...] = ()

    @property
    def network_gbps(self) -> float:
        """GB/s of all ports, each way; 0.0 without ports."""
        return math.fsum(n.rate_gbps for n in self.nics)

    @property
    def local_gbps(self) -> float:
        """GB/s at which one rank exchanges bytes with others of its node: NVLink, else PCIe, else host memory."""
        if self.nvlink_domain > 1 and self.nvlink_gbps is not None:
            return self.nvlink_gbps
        if self.num_gpus and self.pcie_gbps is not None:
            return self.pcie_gbps
        return self.host_gbps

    @property
    def nodes_per_domain(self) -> int:
        """Consecutive nodes that share one NVLink domain; 1 where domains end with the node."""
        return max(1, self.nvlink_domain // self.num_gpus) if self.num_gpus else 1

    @property
    def node_names(self) -> tuple[str, ...]:
        """Names of the group's nodes."""
        return self.hosts or tuple(f"{self.name}-{i}" for i in range(self.count))


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shared path: all traffic between two sides goes through it (a leaf's uplink, a WAN).

    Attributes:
        name: of the link.
        side_a, side_b: names of the groups on either side, without overlap.
        rate_gbps: GB/s in each direction, of all nodes together.
    """

    name: str
    side_a: tuple[str, ...]
    side_b: tuple[str, ...]
    rate_gbps: float


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All machines of a job.

    Attributes:
        groups: of identical nodes.
        links: shared paths between groups; none means that the fabric does not block.
        alpha_s: seconds that a message costs on each hop, however short it is.
        format_version: of the file.
    """

    groups: tuple[NodeGroup, ...]
    links: tuple[Link, ...] = ()
    alpha_s: float = DEFAULT_ALPHA_S
    format_version: int = FORMAT_VERSION

    def group_by_host(self, hosts: Iterable[str]) -> dict[str, NodeGroup]:
        """For each of ``hosts`` the group of the node of that name.

        Raises:
            ConfigError: a host is not in the file; the message names it and the nodes that are.
        """
        known = {name: group for group in self.groups for name in group.node_names}
        found: dict[str, NodeGroup] = {}
        for host in hosts:
            if host not in known:
                names = ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "")
                raise ConfigError(
                    f"host {host!r} runs a rank but is not a node of the cluster file, which has {names}",
                    hint="list it under a group's hosts, or plan without a cluster file",
                )
            found[host] = known[host]
        return found


def default_cluster(hosts: Iterable[str]) -> Cluster:
    """A cluster of one node per distinct host, with rates that any machine of today reaches.

    One port of `DEFAULT_NIC_GBPS`, host memory of `DEFAULT_HOST_GBPS`, no GPUs and no NVLink: a plan made from it is
    correct everywhere, and its predicted seconds are an upper estimate. Measure and write a cluster file for better.
    """
    names = tuple(dict.fromkeys(hosts))
    if not names:
        raise ConfigError("a cluster needs at least 1 host, got 0")
    nics = (Nic(DEFAULT_NIC_GBPS),)
    return Cluster((NodeGroup("default", len(names), DEFAULT_HOST_GBPS, hosts=names, nics=nics),))


def check_cluster(cluster: Cluster) -> None:
    """Refuse what no machine can be.

    Raises:
        ConfigError: zero, negative, infinite or absurd rates and counts, names used twice, unknown groups or GPUs; the
            message names the field, the value and what is allowed.
        FormatVersionError: another format version.
    """
    check_format(cluster.format_version, "the cluster description")
    _check_range("alpha_s", cluster.alpha_s, 0.0, MAX_ALPHA_S)
    if not cluster.groups:
        raise ConfigError("a cluster needs at least 1 group of nodes, got 0")
    names: set[str] = set()
    for group in cluster.groups:
        if group.name in names:
            raise ConfigError(f"two groups are both named {group.name!r}")
        names.add(group.name)
        _check_group(group)
    _check_node_names(cluster)
    for link in cluster.links:
        _check_link(link, names)


def _check_group(group: NodeGroup) -> None:
    where = f"group {group.name!r}: "
    _check_range(where + "count", group.count, 1, MAX_COUNT)
    _check_range(where + "num_gpus", group.num_gpus, 0, MAX_COUNT)
    _check_domain(where, group)
    _check_rate(where + "host_gbps", group.host_gbps)
    for field in ("hbm_gbps", "pcie_gbps", "nvlink_gbps"):
        rate = getattr(group, field)
        needed = group.nvlink_domain > 0 if field == "nvlink_gbps" else group.num_gpus > 0
        if rate is None and needed:
            raise ConfigError(
                f"{where}{field} is missing, but num_gpus is {group.num_gpus} and nvlink_domain {group.nvlink_domain}"
            )
        if rate is not None:
            _check_rate(where + field, rate)
    if group.hosts and len(group.hosts) != group.count:
        raise ConfigError(f"{where}count is {group.count}, but {len(group.hosts)} hosts are listed")
    for i, nic in enumerate(group.nics):
        _check_rate(f"{where}nics[{i}].rate_gbps", nic.rate_gbps)
        _check_range(f"{where}nics[{i}].rail", nic.rail, 0, MAX_COUNT)
        for path in nic.gpus:
            _check_range(f"{where}nics[{i}].gpus", path.gpu, 0, group.num_gpus - 1)


def _check_domain(where: str, group: NodeGroup) -> None:
    """A domain ends with the node, or with one of the nodes after it."""
    size, num_gpus = group.nvlink_domain, group.num_gpus
    _check_range(where + "nvlink_domain", size, 0, MAX_COUNT if num_gpus else 0)
    if size > num_gpus and size % num_gpus:
        raise ConfigError(
            f"{where}nvlink_domain is {size}, allowed is 0 to {num_gpus} (num_gpus), or a multiple of {num_gpus} for a "
            f"domain of several nodes"
        )


def _check_node_names(cluster: Cluster) -> None:
    owner: dict[str, str] = {}
    for group in cluster.groups:
        for name in group.node_names:
            if name in owner:
                raise ConfigError(f"node {name!r} is in group {owner[name]!r} and again in group {group.name!r}")
            owner[name] = group.name


def _check_link(link: Link, names: set[str]) -> None:
    _check_rate(f"link {link.name!r}: rate_gbps", link.rate_gbps)
    for group in (*link.side_a, *link.side_b):
        if group not in names:
            raise ConfigError(f"link {link.name!r} names group {group!r}; the file has {', '.join(sorted(names))}")
    both = set(link.side_a) & set(link.side_b)
    if both or not link.side_a or not link.side_b:
        raise ConfigError(
            f"link {link.name!r} needs two sides without overlap, got {list(link.side_a)} and {list(link.side_b)}"
        )


def _check_rate(what: str, rate: float) -> None:
    if not (math.isfinite(rate) and 0.0 < rate <= MAX_RATE_GBPS):
        raise ConfigError(f"{what} is {rate!r} GB/s, allowed is more than 0 and at most {MAX_RATE_GBPS:g}")


def _check_range(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{what} is {value!r}, allowed is {low:g} to {high:g}")


class _Version(msgspec.Struct):
    format_version: int


def decode_cluster(data: bytes, name: str = "cluster file") -> Cluster:
    """Read a cluster from JSON, strictly, and check it.

    Args:
        data: the file's bytes.
        name: of the file, for messages.

    Raises:
        FormatVersionError: written by another version of wsync.
        ConfigError: truncated, not JSON, unknown or missing fields, wrong types, impossible values.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name} has {len(data)} bytes, allowed are {MAX_FILE_BYTES}")
    try:
        # The version goes first: a newer file's unknown fields should read as "newer", not as a typing error.
        check_format(msgspec.json.decode(data, type=_Version).format_version, name)
        cluster = msgspec.json.decode(data, type=Cluster)
    except (ValueError, RecursionError) as e:
        raise ConfigError(
            f"{name} ({len(data)} bytes) is not a cluster description of version {FORMAT_VERSION}: {e}"
        ) from e
    check_cluster(cluster)
    return cluster


def encode_cluster(cluster: Cluster) -> bytes:
    """The cluster as indented JSON, checked as when it is read."""
    check_cluster(cluster)
    return encode_json(cluster)


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file. Raises as `decode_cluster`; a file that cannot be read is a `ConfigError`."""
    data = read_file(path, MAX_FILE_BYTES, "cluster file")
    return decode_cluster(data, f"cluster file {str(path)!r}")


def dump_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster file. Raises as `check_cluster`; a file that cannot be written is a `ConfigError`."""
    write_file(path, encode_cluster(cluster))
