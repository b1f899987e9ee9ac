"""GPUDirect RDMA: whether NICs get at GPU memory without a copy through host memory."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding
from wsync.topo.model import Nic

MELLANOX = "15b3:"
"""NVIDIA's NICs. Others (EFA, Broadcom) have bridges of their own, of which nothing follows from these modules."""
CONSUMER = "GeForce"
"""GPUs without GPUDirect RDMA. Source: NVIDIA, "GPUDirect RDMA", overview: "on both Tesla and Quadro GPUs"."""


def check_direct(case: Case) -> Iterator[Finding]:
    """Neither the kernel lacks what GPUDirect RDMA needs, nor does NCCL say that it is off."""
    if any(CONSUMER in (g.name or "") for g in case.view.gpus) or not case.profile.p2p:
        return
    told = [o.text for o in case.machine.oddities if o.kind == "gpudirect-off"]
    off = list(dict.fromkeys(case.machine.nccl.gpudirect_off if case.machine.nccl else ()))
    off += [n.label for n in case.view.nics if n.gdr is False and _is_infiniband(n) and n.label not in off]
    if off and not case.declared:
        told.append(f"NCCL found GPUDirect RDMA disabled for {names(off)}")
    nics = [n for n in case.view.nics if _is_infiniband(n)]
    if not told or not (nics or off):
        return
    yield case.finding(
        "nic.gpudirect-off",
        "WARN" if off or _would_be_used(case, nics) else "INFO",
        [n for n in nics if n.label in off],
        f"{'; '.join(told)}: what NICs send and receive is copied through host memory",
        "nvidia_peermem, or NVIDIA's open kernel modules on Linux 5.12 or newer (dma-buf)",
        "modprobe nvidia_peermem, and list it in /etc/modules-load.d; or install the open kernel modules",
    )


def _is_infiniband(nic: Nic) -> bool:
    return nic.rdma is not False and ((nic.device_id or "").startswith(MELLANOX) or nic.label.startswith("mlx"))


def _would_be_used(case: Case, nics: list[Nic]) -> bool:
    """Whether NCCL would read GPU memory from one of these NICs if it could."""
    return case.coherent or any(case.view.is_local(g, n) for g in case.view.gpus for n in nics)
