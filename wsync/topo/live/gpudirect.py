"""What of GPUDirect RDMA the kernel tells: whether a NIC can get at the memory of GPUs at all.

A driver of NICs gets addresses of GPU memory from ``nvidia_peermem`` (before release 470: ``nv_peer_mem``), or as
dma-buf, which NVIDIA's open kernel modules export and Linux takes from 5.12 on.

Source: NVIDIA GPU Operator documentation, "GPUDirect RDMA and GPUDirect Storage"; NVIDIA/nccl issue 1474; NCCL 2.30
``src/transport/net_ib`` for the names of the modules.
"""

from __future__ import annotations

import re

MODULES = "/sys/module"
DRIVER = "/proc/driver/nvidia/version"
KERNEL = "/proc/sys/kernel/osrelease"
PEER_MEMORY = ("nvidia_peermem", "nv_peer_mem")
OPEN_DRIVER = "Open Kernel Module"
DMABUF_KERNEL = (5, 12)


def why_not_direct(modules: list[str], driver: str | None, kernel: str | None) -> str | None:
    """What keeps NICs away from GPU memory; None if nothing does, or not enough is known.

    Args:
        modules: names in ``/sys/module``.
        driver: ``/proc/driver/nvidia/version``.
        kernel: ``/proc/sys/kernel/osrelease``.
    """
    if "nvidia" not in modules or any(m in modules for m in PEER_MEMORY) or not driver:
        return None
    if OPEN_DRIVER not in driver:
        return "nvidia_peermem is not loaded, and NVIDIA's proprietary kernel module exports no dma-buf"
    found = re.match(r"(\d{1,3})\.(\d{1,3})", kernel or "")
    if found is not None and (int(found[1]), int(found[2])) < DMABUF_KERNEL:
        return f"nvidia_peermem is not loaded, and Linux {found[0]} takes no dma-buf of GPUs"
    return None
