"""Output of nccl-tests and nvbandwidth, as far as it says what machine it ran on. The rates are not a topology."""

from __future__ import annotations

import re

from wsync.topo.model import Gpu, Machine
from wsync.topo.parse.text import MAX_DEVICES, bus_id

_RANK = re.compile(r"#\s+Rank\s+\d+ .*? on\s+(\S+) device\s+(\d{1,4}) \[(0x[0-9a-fA-F]+|[0-9a-fA-F:.]+)\] (.+?)\s*$")
_DEVICE = re.compile(r"Device (\d{1,4}): (.+?)(?: \(([0-9a-fA-F:.]+)\))?\s*$")


def looks_like_bench(text: str) -> bool:
    """Whether nccl-tests or nvbandwidth wrote it."""
    return "busbw" in text or "bandwidth (GB/s)" in text or "nvbandwidth" in text


def parse_bench(text: str, source: str) -> Machine:
    """The GPUs that took part, of the first host only."""
    gpus: dict[int, Gpu] = {}
    host = None
    for line in text.splitlines():
        rank, device = _RANK.match(line), _DEVICE.match(line)
        if rank and host in (None, rank[1]):
            host = rank[1]
            gpus.setdefault(int(rank[2]), Gpu(int(rank[2]), name=rank[4]))
        elif device:
            gpus.setdefault(int(device[1]), Gpu(int(device[1]), name=device[2], bus_id=bus_id(device[3] or "")))
    return Machine(gpus=tuple(gpus.values())[:MAX_DEVICES], sources=(source,))
