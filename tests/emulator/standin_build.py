"""Builds the stand-in for libcudart.so.13 and says why it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

from runner_build import CSRC, Build, build_library, missing

import wsync

SONAME = "libcudart.so.13"
PACKAGE = Path(wsync.__file__).parent
LIBRARY = PACKAGE / "libwsync_cuda.so"


def headers() -> Path | None:
    """The folder of CUDA's headers that belongs to nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    for root in (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")):
        for folder in (root / "include", *root.glob("targets/*/include")):
            if (folder / "cuda_runtime_api.h").exists():
                return folder
    return None


def missing_standin() -> str:
    if reason := missing():
        return reason
    if not LIBRARY.exists():
        return "needs libwsync_cuda.so, which nvcc builds"
    return "" if headers() else "needs CUDA's headers"


def build_standin(cache: Path, folder: Path) -> Path:
    """The stand-in under its own name in ``folder``."""
    flags = ("-O1", "-fPIC", f"-isystem{headers()}")
    build = Build("standin", flags, flags)
    emulator = [
        p
        for p in sorted((CSRC / "emulator").rglob("*.cpp"))
        if p.name not in ("hooks.cpp", "case.cpp", "runner.cpp", "guarded.cpp")
    ]
    kernels = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.name != "probe.cu"]
    versions = folder / "versions"
    versions.write_text(f"{SONAME} {{ global: *; }};\n")
    link = ("-shared", "-Wl,-Bsymbolic", f"-Wl,-soname,{SONAME}", f"-Wl,--version-script={versions}")
    return build_library(build, cache, [*emulator, *kernels], link, folder / SONAME)
