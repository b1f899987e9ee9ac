"""Rates that links achieve: published measurements, the constants fitted to them, and data sheets for the rest.

An *efficiency* is what a stream of a kind achieves of the sum of its links' rates. It is the mean over studies, each
the mean of its points, so that a study with many points counts once. `predict_without` fits it without the study of the
point that is predicted, which is how the constants are tested.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

import msgspec

from wsync.errors import ConfigError

NETWORK, NVLINK, HOST = "network", "nvlink", "host"


class Published(msgspec.Struct, frozen=True):
    """One measurement that somebody published.

    Attributes:
        name: of the machine and what moved.
        kind: of link.
        study: who measured; points of one study are not independent.
        spec_gbps: sum of the links' rates, one direction.
        achieved_gbps: as published.
        fitted: whether the constant of its kind is fitted to it; others only test it.
    """

    name: str
    kind: str
    study: str
    spec_gbps: float
    achieved_gbps: float
    fitted: bool = True

    @property
    def share(self) -> float:
        """Achieved of possible."""
        return self.achieved_gbps / self.spec_gbps


PUBLISHED = (
    Published("GH200, weight sync over 1 NIC of 200 Gbit/s", NETWORK, "verl #7167", 25.0, 25.0),
    Published("GH200, weight sync over 4 NICs of 200 Gbit/s", NETWORK, "verl #7167", 100.0, 90.0),
    Published("H100, weight sync over NIXL, one GPU and NIC", NETWORK, "prime-rl #3341", 50.0, 44.26),
    Published("H100, weight sync over NIXL, 8 GPUs and NICs", NETWORK, "prime-rl #3341", 400.0, 354.0),
    Published("EFA 200 Gbit/s, ib_write_bw", NETWORK, "aws ib_write_bw", 25.0, 24.2, fitted=False),
    Published("NDR 400 Gbit/s, NCCL", NETWORK, "nccl-tests #290", 50.0, 47.0, fitted=False),
    Published("8x A100, broadcast of 8 GiB", NVLINK, "superbenchmark", 300.0, 233.0),
    Published("8x H200, all-reduce ring of 8 GiB", NVLINK, "stas00 H200", 450.0, 366.0),
    Published("8x B200, all-reduce ring of 8 GiB", NVLINK, "stas00 B200", 900.0, 682.0),
    Published("A100, host to GPU, Gen4 x16", HOST, "nvbandwidth README", 31.0, 26.0),
    Published("H200, host to GPU, Gen5 x16", HOST, "stas00 H200", 63.0, 55.4),
    Published("GH200, host to GPU, C2C", HOST, "superbenchmark", 450.0, 365.0),
)
"""Sources: verl issues 7167 and 7291, prime-rl issue 3341, nccl-tests issue 290, microsoft/superbenchmark
``tests/data``, stas00/ml-engineering, NVIDIA/nvbandwidth's README."""

SOFTWARE_BOUND = ("H100, weight sync of verl's README, 8 NICs of 400 Gbit/s", 50.0, 8.25)
"""Name, GB/s of one NIC, GB/s achieved: no topology explains it."""

SOFTWARE_SHARE = 0.5
"""Below this share of what the links should carry the links are not the reason."""

COLLECTIVE_SHARE = ((16 << 20, 0.125), (64 << 20, 0.30), (256 << 20, 0.44), (1 << 30, 0.70), (16 << 30, 0.74))
"""Payload to share of the NICs that a hierarchical all-reduce over 4 nodes achieves. Source:
stas00/ml-engineering, B200 with EFA."""

MEMORY_GBPS = {
    "p100-sxm2": 732.0, "v100-power9": 900.0, "v100-sxm": 900.0, "v100-pcie": 900.0, "a100-sxm": 2039.0,
    "a100-pcie": 1935.0, "a800-sxm": 2039.0, "a800-pcie": 1935.0, "h100-sxm": 3350.0, "h800-sxm": 3350.0,
    "h100-pcie": 2000.0, "h200-nvl": 4800.0, "gh200": 4000.0, "gb200": 8000.0, "b200-sxm": 8000.0, "rubin": 22000.0,
    "ampere-bridge": 696.0, "rtx3090": 936.0, "turing-bridge": 616.0, "rtx4090": 1008.0, "rtx5090": 1792.0,
    "a10": 600.0, "l40s": 864.0,
    "l4": 300.0, "t4": 320.0, "rtx-pro": 1792.0,
}  # fmt: skip
"""Memory of one GPU by profile. Source: NVIDIA's data sheets; of several models of a profile the slowest."""
LEAST_MEMORY_GBPS = 300.0

NIC_GBIT = {
    "v100-sxm": 100.0, "a100-sxm": 200.0, "a800-sxm": 200.0, "h100-sxm": 400.0, "h800-sxm": 400.0, "gh200": 200.0,
    "gb200": 400.0, "b200-sxm": 400.0,
}  # fmt: skip
"""What NICs of such machines usually have, where no input tells. Source: DGX and cloud specifications."""

C2C_GBPS = 450.0


def efficiency(kind: str, without: Iterable[str] = ()) -> float:
    """Mean over the fitted studies of a kind, without some.

    Raises:
        ConfigError: none is left.
    """
    excluded = set(without)
    studies: dict[str, list[float]] = {}
    for point in PUBLISHED:
        if point.kind == kind and point.fitted and point.study not in excluded:
            studies.setdefault(point.study, []).append(point.share)
    if not studies:
        raise ConfigError(f"no published rate of {kind!r} is left to fit to without {', '.join(sorted(excluded))}")
    return math.fsum(math.fsum(s) / len(s) for s in studies.values()) / len(studies)


def predict_without(point: Published) -> float:
    """GB/s that the constant predicts which was fitted without the point's study."""
    return point.spec_gbps * efficiency(point.kind, (point.study,))


def collective_share(nbytes: int) -> float:
    """Share of the NICs that a hierarchical collective achieves at a payload, interpolated between measurements."""
    sizes = [math.log2(size) for size, _ in COLLECTIVE_SHARE]
    at = math.log2(max(nbytes, 1))
    i = bisect.bisect(sizes, at)
    if i == 0:
        return COLLECTIVE_SHARE[0][1] * nbytes / COLLECTIVE_SHARE[0][0]
    if i == len(sizes):
        return COLLECTIVE_SHARE[-1][1]
    (_, low), (_, high) = COLLECTIVE_SHARE[i - 1], COLLECTIVE_SHARE[i]
    return low + (high - low) * (at - sizes[i - 1]) / (sizes[i] - sizes[i - 1])


def is_software_bound(achieved_gbps: float, predicted_gbps: float) -> bool:
    """Whether the links cannot be the reason for a rate."""
    return achieved_gbps < SOFTWARE_SHARE * predicted_gbps
