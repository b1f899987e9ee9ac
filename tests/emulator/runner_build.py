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


_CALLS = ("-mmemcpy-strategy=libcall:-1:noalign", "-mmemset-strategy=libcall:-1:noalign")
_SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Build:
    """Flags of one kind of runner, for the emulator and for everything else (``tested``)."""

    name: str
    flags: tuple[str, ...] = ("-O2",)
    tested: tuple[str, ...] = ("-O2",)
    hooked: bool = False
    link: tuple[str, ...] = ()


PLAIN = Build("plain")
CHECKED = Build(
    "checked",
    tested=(
        "-O1",
        "-fsanitize=thread",
        "--param=tsan-instrument-func-entry-exit=0",
        *(_CALLS if os.uname().machine == "x86_64" else ()),
    ),
    hooked=True,
)
"""Kernels report every access to memory: to csrc/emulator/hooks.cpp, not to ThreadSanitizer."""
UCONTEXT = Build("ucontext", ("-O2", "-DWSYNC_EMULATOR_UCONTEXT"), ("-O2", "-DWSYNC_EMULATOR_UCONTEXT"))
"""Fibers as on processors for which there is no switch by hand."""
SANITIZED = Build("sanitized", ("-O2", "-DWSYNC_EMULATOR_ASAN=1"), _SANITIZERS, link=_SANITIZERS)


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


def _flags(csrc: Path, source: Path, build: Build) -> tuple[str, ...]:
    if csrc / "emulator" in source.parents:
        return (*COMMON, *build.flags)
    return (*COMMON, *build.tested, *(KERNELS if source.suffix == ".cu" else ()))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _object(csrc: Path, source: Path, build: Build, cache: Path) -> Path:
    flags = _flags(csrc, source, build)
    digest = hashlib.sha256(repr(flags).encode())
    for path in _closure(csrc, source):
        digest.update(os.path.relpath(path, csrc).encode() + path.read_bytes())
    out = cache / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if out.exists():
        out.touch()
        return out
    part = out.with_suffix(f".{os.getpid()}.part")
    _run([str(COMPILER), *flags, f"-I{csrc}", "-c", str(source), "-o", str(part)])
    if build.hooked and csrc / "emulator" not in source.parents:
        renames = [f"--redefine-sym={name}=wsync_emulator_{name}" for name in RENAMED]
        _run(["objcopy", *renames, str(part)])
    part.rename(out)
    return out


def build_runner(build: Build, cache: Path, csrc: Path = CSRC) -> Path:
    """Path of the runner for this tree of sources. What was compiled before is not compiled again."""
    return build_program(build, cache, csrc, _sources(csrc, build))


def build_toys(build: Build, cache: Path, source: Path) -> Path:
    """Path of a program of one kernel source, with a main of its own, and the emulator."""
    without = ("case.cpp", "runner.cpp")
    emulator = [p for p in _sources(CSRC, build) if p.parent.name == "emulator" and p.name not in without]
    return build_program(build, cache, CSRC, [*emulator, source])


def _objects(build: Build, cache: Path, csrc: Path, sources: list[Path]) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: _object(csrc, source, build, cache), sources))


def build_library(build: Build, cache: Path, sources: list[Path], link: tuple[str, ...], out: Path) -> Path:
    """A shared library at ``out``."""
    objects = _objects(build, cache, CSRC, sources)
    _run([str(COMPILER), *link, *map(str, objects), "-ldl", "-o", str(out)])
    return out


def build_program(build: Build, cache: Path, csrc: Path, sources: list[Path]) -> Path:
    objects = _objects(build, cache, csrc, sources)
    digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:24]
    out = cache / f"runner-{build.name}-{digest}"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}.part")
        _run([str(COMPILER), *build.link, "-rdynamic", *map(str, objects), "-ldl", "-o", str(part)])
        part.rename(out)
    return out
