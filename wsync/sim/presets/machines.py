"""Nodes that presets are made of. Rates are GB/s in one direction.

Sources: NVIDIA's data sheets for H100, H200, H20 and GB200 NVL72 say memory rates (H100 SXM 3350, H200 4800, H20 4000,
B200 8000) and NVLink: 900 GB/s both ways of 18 NVLink 4 links (H100, H200, H20), 1800 of 18 NVLink 5 links (GB200). DGX
H100's has eight ports of 400 Gb/s for eight GPUs, a GB200 compute tray four for four. PCIe is 55.4 GB/s of the 63 that
Gen5 x16 offers: what `nvbandwidth` reports from host to device on H100.
"""

from __future__ import annotations

from wsync.spec.cluster import Nic, NicPath, NodeGroup

H100_GB, H200_GB, H20_GB, GB200_GB = 80.0, 141.0, 96.0, 186.0
"""Memory of one GPU, of the same data sheets."""
RDMA_ALPHA_S = 5e-6
"""What one message costs beside its bytes: posting it, and its completion. An assumption, the same for all presets."""

_NIC_GBPS = 50.0
_PCIE_GBPS = 55.4
_HOST_GBPS = 300.0
"""Copy rate of two sockets with eight or more channels each: an assumption; presets hardly use host memory."""


def _node(name: str, count: int, hbm_gbps: float, gpus: int, nvlink_gbps: float, domain: int) -> NodeGroup:
    return NodeGroup(
        name,
        count,
        _HOST_GBPS,
        num_gpus=gpus,
        hbm_gbps=hbm_gbps,
        pcie_gbps=_PCIE_GBPS,
        nvlink_gbps=nvlink_gbps,
        nvlink_domain=domain,
        nics=tuple(Nic(_NIC_GBPS, i, (NicPath(i, "PIX"),)) for i in range(gpus)),
    )


def h100(name: str, count: int) -> NodeGroup:
    """Nodes of 8 H100 SXM and 8 ports of 400 Gb/s."""
    return _node(name, count, 3350.0, 8, 450.0, 8)


def h200(name: str, count: int) -> NodeGroup:
    """Nodes of 8 H200 and 8 ports of 400 Gb/s."""
    return _node(name, count, 4800.0, 8, 450.0, 8)


def h20(name: str, count: int) -> NodeGroup:
    """Nodes of 8 H20 and 8 ports of 400 Gb/s."""
    return _node(name, count, 4000.0, 8, 450.0, 8)


def gb200(name: str, count: int, domain: int = 72) -> NodeGroup:
    """Trays of 4 GB200 GPUs and 4 ports of 400 Gb/s; ``domain`` GPUs of consecutive trays share NVLink."""
    return _node(name, count, 8000.0, 4, 900.0, domain)
