"""What the kernels compile to, without a GPU: resources, and instructions against the budget of an H100.

Predictions, not measurements. At 132 multiprocessors, 1.7 GHz and 3.35 TB/s an H100 has time, for each 16 bytes that
cross its memory bus, for `BUDGET` instructions of one thread. A kernel whose counts all stay below it can be bound by
memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsync.errors import ConfigError
from wsync.kernels.triton import configs
from wsync.kernels.triton.launch import calls
from wsync.kernels.triton.support import interpreted
from wsync.plan import descriptors as d

ARCHS = (80, 90, 100, 120)
"""Compute capabilities: A100, H100, B200, RTX PRO 6000."""

BUDGET = {"issue": 142.0, "alu": 71.0, "lsu": 35.0, "cvt": 18.0}
"""Instructions of one thread per 16 bytes of an H100's memory traffic: all, integer and logic, memory and shuffles,
conversions."""

_CLASSES = {
    "alu": "LOP3 IADD3 ISETP SHF PRMT SEL VIMNMX VIMNMX3 LEA FMNMX FSETP VIADD SGXT FSEL PLOP3 P2R BMSK IABS IADD LOP",
    "lsu": "LDG STG LDS STS SHFL RED REDG REDUX ATOM ATOMG LDSM STSM LDC LDL STL",
    "cvt": "F2F F2FP I2F I2FP F2I MUFU",
}
_CLASS_OF = {op: name for name, ops in _CLASSES.items() for op in ops.split()}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_RESOURCE = re.compile(r"(REG|STACK|LOCAL):(\d+)")
_TYPES = {"dst_base": "i64", "src_base": "i64", "units": "*i32"}

_FULL = configs.TILE * configs.TILE
_WORDS = 4096 * 8


def cases() -> dict[str, tuple[tuple[Any, ...], int, int]]:
    """For each representative launch: its key (see `launch.calls`), bytes read and bytes written by one program."""
    bf16, f32 = d.SRC_BF16, d.SRC_F32
    found: dict[str, tuple[tuple[Any, ...], int, int]] = {}
    recipes = {
        "fp8_block128": d.OP_FP8_BLOCK128,
        "fp8_block128_f32": d.OP_FP8_BLOCK128_F32,
        "fp8_tensor": d.OP_FP8_TENSOR,
        "mxfp8": d.OP_MXFP8,
    }
    for name, op in recipes.items():
        found[f"pack {name}, bf16"] = (("quantise_tiles", op, bf16, True, True, False), 2 * _FULL, _FULL)
        found[f"pack {name}, f32"] = (("quantise_tiles", op, f32, True, True, False), 4 * _FULL, _FULL)
    for name, src, size in (("bf16", bf16, 2), ("f32", f32, 4)):
        key = ("quantise_tiles", d.OP_NVFP4, src, True, True, False)
        found[f"pack nvfp4, {name}"] = (key, size * _FULL, _FULL * 9 // 16)
        rows, cols, _ = configs.row_tile(4096)
        found[f"pack fp8_channel, {name}"] = (("quantise_rows", src, rows, cols, True), size * _FULL, _FULL)
    found["pack bf16, bf16"] = (("copy_words", bf16, 8, 512), _WORDS, _WORDS)
    found["pack bf16, f32"] = (("round_words", 8, 512), 2 * _WORDS, _WORDS)
    found["pack copy"] = (("copy_words", d.SRC_BYTES, 8, 512), _WORDS, _WORDS)
    found["unpack"] = (("unpack_words", False, 8, 512), _WORDS, _WORDS)
    found["installed digest"] = (("unpack_words", True, 8, 512), _WORDS, 0)
    found["digest"] = (("digest_ranges", True), _WORDS, 0)
    found["amax of a tensor, bf16"] = (("amax_tiles", d.OP_FP8_TENSOR, bf16, True), 2 * _FULL, 0)
    found["amax of blocks, f32"] = (("amax_tiles", d.OP_FP8_BLOCK128, f32, True), 4 * _FULL, 0)
    return found


def edge_cases() -> dict[str, tuple[Any, ...]]:
    """Launches for edges, odd strides and rare operations: they need only compile within their means."""
    bf16 = d.SRC_BF16
    found: dict[str, tuple[Any, ...]] = {}
    for op in range(d.OP_FP8_BLOCK128, d.OP_NVFP4 + 1):
        if op != d.OP_FP8_CHANNEL:
            found[f"edge tiles of op {op}"] = ("quantise_tiles", op, bf16, False, True, False)
    found["nvfp4 of unusual scale"] = ("quantise_tiles", d.OP_NVFP4, bf16, False, True, True)
    found["scales of long rows"] = ("row_scales", bf16)
    found["rows of 28672"] = ("quantise_rows", bf16, 1, 32768, False)
    found["elements"] = ("copy_elements", d.OP_COPY, bf16, 2, 32, 128)
    found["exponents"] = ("unpack_elements", d.UNPACK_EXPONENT, 1, 32, 128)
    found["fills"] = ("unpack_elements", d.UNPACK_FILL, 4, 32, 128)
    found["scales of cells"] = ("scales_of_cells", d.OP_FP8_BLOCK128)
    found["digest of bytes"] = ("digest_ranges", False)
    found["digest of boxes"] = ("digest_boxes",)
    return found


def compiled(key: tuple[Any, ...], arch: int) -> tuple[Any, int]:
    """The kernel of a launch compiled for ``arch``, and its warps.

    Raises:
        ConfigError: the kernels were imported for the interpreter.
    """
    if interpreted():
        raise ConfigError("kernels imported with TRITON_INTERPRET=1 cannot be compiled: use a process without it")
    kernel, constants, warps = calls(key, arch)
    names = [param.name for param in kernel.params]
    signature = {name: "constexpr" if name in constants else _TYPES.get(name, "*i64") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
    options = {"num_warps": warps, **configs.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), warps


def disassembled(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """Registers, stack and local bytes of a thread, and the instructions of the main path."""
    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, text = (
            subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    resources = {name: int(value) for name, value in _RESOURCE.findall(usage)}
    ops = [op for op in _INSTRUCTION.findall(text) if op != "NOP"]
    # Behind the last EXIT lie the slow paths of divisions, which normal numbers never take.
    last = max(i for i, op in enumerate(ops) if op.startswith("EXIT"))
    return resources, ops[: last + 1]


def figures(key: tuple[Any, ...], bytes_read: int, bytes_written: int, arch: int) -> dict[str, Any]:
    """What one launch compiles to; the counts are per 16 bytes of memory traffic."""
    binary, warps = compiled(key, arch)
    resources, ops = disassembled(binary.asm["cubin"])
    per_16_bytes = warps * 32 * 16 / (bytes_read + bytes_written)
    counts = Counter(_CLASS_OF.get(op.split(".")[0], "other") for op in ops)
    per = {"issue": len(ops) * per_16_bytes, **{name: counts[name] * per_16_bytes for name in _CLASSES}}
    registers, shared = resources["REG"], int(binary.metadata.shared)
    blocks = min(65536 // (-(-registers // 8) * 8 * warps * 32), 64 // warps, 227 * 1024 // (shared + 1024))
    return {
        "arch": f"sm_{arch}{'a' if arch >= 90 else ''}",
        "warps": warps,
        "registers": registers,
        "stack_bytes": resources["STACK"],
        "local_bytes": resources["LOCAL"],
        "shared_bytes": shared,
        "blocks_per_sm": blocks,
        "in_flight_kib_per_sm": blocks * bytes_read / 1024,
        "loads_128": sum(op.startswith("LDG.E.128") for op in ops),
        "stores_128": sum(op.startswith("STG.E.128") for op in ops),
        "spills": sum(op.startswith(("LDL", "STL")) for op in ops),
        "generic": sum(op.split(".")[0] in ("LD", "ST") for op in ops),
        "per_16_bytes": {name: round(value, 1) for name, value in per.items()},
        "instructions_per_byte": round(per["issue"] / 16, 2),
        "predicted_roof_share": round(min(1.0, *(BUDGET[name] / max(value, 1e-9) for name, value in per.items())), 2),
    }


def table(archs: tuple[int, ...] = ARCHS) -> list[dict[str, Any]]:
    """Figures of every representative launch for every architecture."""
    return [
        {"kernel": name, **figures(key, bytes_read, bytes_written, arch)}
        for name, (key, bytes_read, bytes_written) in cases().items()
        for arch in archs
    ]
