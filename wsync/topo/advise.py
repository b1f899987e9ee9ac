"""NCCL variables that a machine needs, each with its reason, and only where they differ from what NCCL would do anyway.

Source of the defaults: NCCL 2.30.7, ``src/graph/paths.cc`` (peer access up to PXB, on AMD hosts of two GPUs up to SYS;
GPUDirect RDMA up to PXB, with C2C up to P2C) and its ``env.rst``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from wsync.topo.checks import Case, run_checks
from wsync.topo.findings import Finding
from wsync.topo.model import KIND_RANK, Machine, Nic
from wsync.topo.nics import compute_nics
from wsync.topo.platforms import profile_named
from wsync.topo.roots import find_roots

ADVICE_VERSION = 1
"""Version of ``wsync topo advise --json``."""

Fabric = Literal["unknown", "rails", "shared"]
VM_TOPO_FILE = "/var/run/nvidia-topologyd/virtualTopology.xml"
"""Where NCCL itself looks (2.30.7, ``src/graph/topo.cc``)."""
DEFAULT_TOPO_FILE = "/etc/nccl/topo.xml"
_NUMBERED = re.compile(r"(.*?)(\d+)")


class Advice(msgspec.Struct, frozen=True):
    """One variable.

    Attributes:
        name, value: to set.
        default: what NCCL does without it.
        reason: why that is not enough here, with what was seen.
        measure: it depends on more than the topology tells: measure with and without.
    """

    name: str
    value: str
    default: str
    reason: str
    measure: bool = False


class Advised(msgspec.Struct, frozen=True):
    """What one host needs.

    Attributes:
        host: its name, or None.
        advice: variables to set.
        notes: what keeps a variable from being recommended, or what else to do first.
    """

    host: str | None
    advice: tuple[Advice, ...]
    notes: tuple[str, ...] = ()
    format_version: int = ADVICE_VERSION


def advise(machine: Machine, platform: str | None = None, fabric: Fabric = "unknown") -> Advised:
    """Recommend variables for one machine.

    Args:
        machine: what was read.
        platform: a profile's name, where the automatic choice should not be used.
        fabric: ``"rails"`` where NICs of equal position have switches of their own without fast links between them,
            ``"shared"`` where all NICs of a host are on one switch; one machine's topology does not tell.

    Raises:
        ConfigError: no such platform.
    """
    case = Case(machine, profile_named(platform) if platform else None)
    findings = find_roots(case, run_checks(case))
    seen = {f.id: f for g in findings for f in (g, *g.symptoms)}
    advice = [
        *_hca(case),
        *_cross_nic(case, fabric),
        *_gdr_level(case, seen),
        *_p2p_level(case, seen),
        *_nvls(case, seen),
        *_mnnvl(seen),
        *_topo_file(seen),
    ]
    return Advised(machine.host, tuple(advice), tuple(_notes(case, seen)))


def hca_value(nics: Sequence[Nic]) -> str:
    """The exact list of these NICs."""
    return "=" + ",".join(n.label for n in nics)


def _hca(case: Case) -> Iterator[Advice]:
    chosen = compute_nics(case.view, case.coherent)
    if not chosen or not _named(chosen) or case.declared or all(n.gdr is False for n in chosen) or _cut(case):
        return
    rest = [n for n in case.view.nics if n not in chosen]
    gaps = _left_out(case.view.nics) if not rest else ()
    if not rest and not gaps:
        return
    if rest:
        reason = f"{_some([_why(case, n) for n in rest])}; NCCL would use all {len(case.view.nics)}"
    else:
        reason = f"the numbers leave out {_some(gaps)}, which NCCL did not use when it wrote this; a job may use them"
    yield Advice("NCCL_IB_HCA", hca_value(chosen), "every RDMA device that is up", reason)


def _named(nics: Sequence[Nic]) -> bool:
    return not any(n.label.startswith(("NIC", "nic@", "NET/")) for n in nics)


def _cut(case: Case) -> bool:
    """GPUs are not described: NICs that seem to be near none may be near these."""
    return any(not g.shown or not case.view.nic_paths[g.index] for g in case.view.gpus)


def _why(case: Case, nic: Nic) -> str:
    if nic.state not in (None, "ACTIVE"):
        return f"{nic.label} is {nic.state}"
    kinds = [paths[nic.label] for paths in case.view.nic_paths.values() if nic.label in paths]
    if not kinds or KIND_RANK[min(kinds, key=KIND_RANK.__getitem__)] <= KIND_RANK["PXB"]:
        return f"{nic.label} is slower ({nic.rate_gbit or 0:g} Gbit/s)"
    return f"{nic.label} is near no GPU ({min(kinds, key=KIND_RANK.__getitem__)})"


def _left_out(nics: Sequence[Nic]) -> tuple[str, ...]:
    """Devices that the numbers of the others imply: a dump of NCCL's has only those that it used."""
    found: dict[str, set[int]] = {}
    for nic in nics:
        match = _NUMBERED.fullmatch(nic.label)
        if match is None:
            return ()
        found.setdefault(match[1], set()).add(int(match[2]))
    if len(found) != 1:
        return ()
    (stem, numbers), *_ = found.items()
    return tuple(f"{stem}{i}" for i in range(min(numbers), max(numbers)) if i not in numbers)


def _cross_nic(case: Case, fabric: Fabric) -> Iterator[Advice]:
    if len(compute_nics(case.view, case.coherent)) < 2 or fabric == "unknown":
        return
    if fabric == "rails":
        reason = "each NIC has a rail of its own and links between rails are slow"
        yield Advice("NCCL_CROSS_NIC", "0", "2: prefers the same NIC, and crosses where that looks faster", reason)
    else:
        reason = "all NICs of a host are on one switch, so that keeping to a rail avoids no collision"
        yield Advice("NCCL_CROSS_NIC", "1", "2: prefers the same NIC", reason, measure=True)


def _gdr_level(case: Case, seen: dict[str, Finding]) -> Iterator[Advice]:
    """GPUDirect RDMA stops at PXB; hosts whose NICs hang from the host bridge go through memory by default."""
    if case.coherent or "vm.tree-hidden" in seen or "vm.virtual-bridge" in seen:
        return
    nics = compute_nics(case.view)
    kinds = [
        min((paths[n.label] for n in nics if n.label in paths), key=KIND_RANK.__getitem__, default=None)
        for paths in case.view.nic_paths.values()
    ]
    known = [k for k in kinds if k is not None]
    if not known or any(KIND_RANK[k] <= KIND_RANK["PXB"] for k in known) or all(n.gdr is False for n in nics):
        return
    nearest = min(known, key=KIND_RANK.__getitem__)
    if nearest == "SYS":
        return
    # NCCL has no NODE: between PHB and SYS there is nothing.
    value = "PHB" if nearest == "PHB" else "SYS"
    reason = f"none of {len(known)} GPUs has a NIC nearer than {nearest}: by default host memory carries all traffic"
    yield Advice("NCCL_NET_GDR_LEVEL", value, "PXB", reason, measure=True)


def _p2p_level(case: Case, seen: dict[str, Finding]) -> Iterator[Advice]:
    paths = case.view.gpu_paths.values()
    kinds = {p.kind for p in paths}
    if "p2p.none" in seen or not paths:
        return
    bridged = case.shape.joined == "bridge" or (case.shape.joined == "mesh" and "NV" in kinds)
    through_host = sorted(kinds & {"PHB", "NODE", "SYS"}, key=KIND_RANK.__getitem__)
    if "NV" in kinds and "p2p.pair-refused" in seen:
        reason = "some PCIe pairs refuse peer access, NVLink pairs do not"
        yield Advice("NCCL_P2P_LEVEL", "NVL", "PXB", reason)
    elif not bridged and "NV" not in kinds and through_host == ["PHB"] and case.profile.p2p and len(case.view.gpus) > 1:
        reason = "all pairs are below one host bridge (PHB), where NCCL copies through host memory by default"
        yield Advice("NCCL_P2P_LEVEL", "PHB", "PXB", reason, measure=True)


def _nvls(case: Case, seen: dict[str, Finding]) -> Iterator[Advice]:
    """A fabric that is not ready makes NCCL fail; one GPU without links only makes it go without NVLink SHARP."""
    fault = seen.get("fabric.state")
    if fault is not None and case.profile.links == 18 and fault.severity in ("WARN", "CRIT"):
        reason = (
            f"{fault.evidence}: NCCL fails where it cannot allocate NVLink SHARP on every GPU. Only until the fabric "
            "manager is up"
        )
        yield Advice("NCCL_NVLS_ENABLE", "0", "2: used where the switches have it", reason)


def _mnnvl(seen: dict[str, Finding]) -> Iterator[Advice]:
    if "fabric.split" in seen:
        reason = (
            f"{seen['fabric.split'].evidence}: the job is in several NVLink partitions. Only until that is repaired"
        )
        yield Advice("NCCL_MNNVL_ENABLE", "0", "2: used where the fabric is complete", reason)


def _topo_file(seen: dict[str, Finding]) -> Iterator[Advice]:
    for name in ("vm.tree-hidden", "vm.virtual-bridge"):
        if name in seen and not Path(VM_TOPO_FILE).is_file():
            reason = f"{seen[name].evidence}: NCCL takes distances and rates from a tree that is not the real one"
            yield Advice("NCCL_TOPO_FILE", DEFAULT_TOPO_FILE, "the PCIe tree of sysfs", reason)
            return


def _notes(case: Case, seen: dict[str, Finding]) -> Iterator[str]:
    chosen = compute_nics(case.view, case.coherent)
    if chosen and not _named(chosen) and len(chosen) < len(case.view.nics):
        yield (
            f"NCCL_IB_HCA: the job should use {_some([n.label for n in chosen], 16)}, whose names the inputs do not "
            "give: add the NIC legend of `nvidia-smi topo -m`"
        )
    if chosen and _named(chosen) and not case.view.sockets_only and len(chosen) < len(case.view.nics) and _cut(case):
        yield "NCCL_IB_HCA: not all GPUs are described, so that NICs which seem near none may be near these"
    if "vm.tree-hidden" in seen or "vm.virtual-bridge" in seen:
        yield (
            "NCCL_TOPO_FILE: dump the topology on the hypervisor or a bare host of this kind (NCCL_TOPO_DUMP_FILE), "
            "put in the bus ids of the virtual machine, and lint it with `wsync topo lint FILE --machine ...`"
        )
    if not case.view.nics:
        yield "no NIC is known: add the output of `nvidia-smi topo -m`"
    for finding in seen.values():
        if finding.id in ("nvlink.gpu-isolated", "gpu.lost", "p2p.none") and finding.severity == "CRIT":
            yield f"no variable repairs {finding.id} ({', '.join(finding.subject.devices[:4])}): {finding.remedy}"


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
