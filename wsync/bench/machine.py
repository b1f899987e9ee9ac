"""What a number was measured on and with: without that it is noise."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from wsync.bench.limit import num_cores

_PACKAGES = ("wsync-rl", "torch", "transformers", "safetensors", "numpy", "msgspec", "pyzmq")
_ISA = ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def describe_machine() -> dict[str, Any]:
    """Processor, memory and kernel of this machine."""
    info = _cpuinfo()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "isa": isa(),
        "num_cores": num_cores(),
        "memory_bytes": _memory_bytes(),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "transparent_hugepages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "cpu_quota": _first_line("/sys/fs/cgroup/cpu.max"),
    }


def isa() -> list[str]:
    """The instruction sets that kernels care about."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return [name for name in _ISA if name in flags]


def package_versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions of Python and of what the benchmark runs on; ``more`` are further packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if found["wsync-rl"] is None:
        from wsync import __version__

        found["wsync-rl"] = __version__
    return found


def filesystem_of(folder: Path) -> tuple[str, str]:
    """Type and mount point of the filesystem that holds ``folder``; ``unknown`` where /proc does not say."""
    best = ("unknown", "")
    path = str(folder.resolve())
    for line in _lines("/proc/self/mounts"):
        fields = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1])
        inside = mount == "/" or path == mount or path.startswith(mount + "/")
        if inside and len(mount) >= len(best[1]):
            best = (fields[2], mount)
    return best


def _cpuinfo() -> dict[str, str]:
    pairs = (line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(path: str) -> str | None:
    lines = _lines(path)
    return lines[0] if lines else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
