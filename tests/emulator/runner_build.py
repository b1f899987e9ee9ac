"""Builds the runner of emulated kernels with g++, object by object, and keeps objects by the hash of their sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++")
COMMON = ("-std=c++17", "-DWSYNC_EMULATE", "-ffp-contract=off", "-g1", "-Wall", "-Wextra", "-Werror")
KERNELS = ("-x", "c++", "-Wno-unknown-pragmas")
RENAMED = ("memcpy", "memset")


@dataclass(frozen=True)
class Build:
    """Flags of one kind of runner; ``hooked`` kernels report every access to memory."""

    name: str
    flags: tuple[str, ...] = ()
    kernel_flags: tuple[str, ...] = ()
    hooked: bool = False
    environment: tuple[tuple[str, str], ...] = ()


PLAIN = Build("plain", ("-O2",), ("-O2",))
CHECKED = Build(
    "checked",
    ("-O2",),
    (
        "-O1",
        "-fsanitize=thread",
        "--param=tsan-instrument-func-entry-exit=0",
        *(("-mmemcpy-strategy=libcall:-1:noalign", "-mmemset-strategy=libcall:-1:noalign")
          if os.uname().machine == "x86_64" else ()),
    ),
    hooked=True,
)
_SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZED = Build(
    "sanitized", _SANITIZERS, _SANITIZERS, environment=(("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", ""))
)


def missing() -> str:
    """Why no runner can be built here, or an empty string."""
    if COMPILER is None:
        return "needs g++"
    return "" if shutil.which("objcopy") else "needs objcopy"


def _sources(csrc: Path, build: Build) -> list[Path]:
    emulator = [p for p in sorted((csrc / "emulator").glob("*.cpp")) if build.hooked or p.name != "hooks.cpp"]
    kernels = [p for p in sorted((csrc / "cuda").glob("*.cu")) if p.name != "probe.cu"]
    return emulator + sorted((csrc / "cuda").glob("program*.cpp")) + kernels


def _closure(csrc: Path, source: Path) -> list[Path]:
    """The source and every file of the project that it includes."""
    found, todo = {source}, [source]
    while todo:
        for name in re.findall(r'#include "([^"]+)"', todo.pop().read_text()):
            path = csrc / name
            if path not in found and path.exists():
                found.add(path)
                todo.append(path)
    return sorted(found)


def _flags(source: Path, build: Build) -> tuple[str, ...]:
    kernel = source.suffix == ".cu"
    return (*COMMON, *(build.kernel_flags if kernel else build.flags), *(KERNELS if kernel else ()))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _object(csrc: Path, source: Path, build: Build, cache: Path) -> Path:
    flags = _flags(source, build)
    digest = hashlib.sha256(repr(flags).encode())
    for path in _closure(csrc, source):
        digest.update(str(path.relative_to(csrc)).encode() + path.read_bytes())
    out = cache / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if out.exists():
        return out
    part = out.with_suffix(f".{os.getpid()}.part")
    _run([str(COMPILER), *flags, f"-I{csrc}", "-c", str(source), "-o", str(part)])
    if build.hooked and source.suffix == ".cu":
        renames = [f"--redefine-sym={name}=wsync_emulator_{name}" for name in RENAMED]
        _run(["objcopy", *renames, str(part)])
    part.rename(out)
    return out


def build_runner(build: Build, cache: Path, csrc: Path = CSRC) -> Path:
    """Path of the runner for this tree of sources. What was compiled before is not compiled again."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(csrc, source, build, cache), _sources(csrc, build)))
    digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:24]
    out = cache / f"runner-{build.name}-{digest}"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}.part")
        link = [f for f in build.flags if f.startswith("-fsanitize")]
        _run([str(COMPILER), *link, "-rdynamic", *map(str, objects), "-ldl", "-o", str(part)])
        part.rename(out)
    return out
