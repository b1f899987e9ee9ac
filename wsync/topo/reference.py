"""Reference rates: what links carry by their specification and what NCCL assumes of them. GB/s, one direction.

Source: NCCL 2.30.7 ``src/graph/topo.h`` and ``topo.cc``; PCI-SIG and InfiniBand rates.
"""

from __future__ import annotations

PCIE_LANE_GBPS: dict[float, float] = {2.5: 0.25, 5.0: 0.5, 8.0: 0.985, 16.0: 1.969, 32.0: 3.938, 64.0: 7.563}
"""GT/s of a lane to its payload rate, before packet headers."""

PCIE_GENERATION: dict[float, int] = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}

NCCL_PCIE_LANE_GBPS: dict[float, float] = {2.5: 0.1875, 5.0: 0.375, 8.0: 0.75, 16.0: 1.5, 32.0: 3.0, 64.0: 6.0}
"""What NCCL's search takes for a lane: 12, 24, 48 and 96 GB/s for 16 lanes of generations 3 to 6."""

NCCL_NVLINK_GBPS: dict[int, float] = {60: 18.0, 70: 20.0, 80: 20.0, 86: 12.0, 90: 20.6, 100: 40.1}
"""What NCCL's search takes for one NVLink, by compute capability."""

NIC_RATES_GBIT = (10.0, 20.0, 25.0, 40.0, 50.0, 56.0, 80.0, 100.0, 112.0, 200.0, 400.0, 800.0, 1600.0)
"""Rates that ports are sold with, also two or four lanes of them."""

QPI_GBPS = {"GenuineIntel": 22.0, "AuthenticAMD": 16.0, "arm64": 6.0}
"""What NCCL's search takes for the path between two sockets."""


def pcie_gbps(speed_gtps: float | None, width: int | None) -> float | None:
    """Payload rate of a port; NCCL reads a width of 0 as 16, and so do we. None if the speed is unknown."""
    if speed_gtps is None or speed_gtps not in PCIE_LANE_GBPS:
        return None
    return PCIE_LANE_GBPS[speed_gtps] * (width or 16)


def generation(speed_gtps: float | None) -> str:
    """``"Gen4"``, or the speed itself where it is none of the standard ones."""
    return f"Gen{PCIE_GENERATION[speed_gtps]}" if speed_gtps in PCIE_GENERATION else f"{speed_gtps} GT/s"
