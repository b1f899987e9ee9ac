"""What the machine code of the CUDA kernels predicts for an H100, without a GPU: ``python -m wsync.bench.aot``.

For the loop that moves a kernel's payload this counts the instructions on the way that a full tile takes, and sets them
against what an H100 SXM can issue in the time that its memory needs for the same bytes: for every 16 bytes of traffic
142 instructions of a thread in all, 71 of the integer and compare pipe, 35 of loads, stores and shuffles, and 18 of
conversions and special functions. The resident threads times the bytes that each has on its way must cover the memory's
latency. A stream of plain copies is assumed to reach 92 % of the nominal bandwidth, which caps the prediction.

It is a prediction: caches, the scheduler and the clock are not modelled, and nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from wsync.bench.sass import Instruction, Resources, blocks_of, functions, hot_loop, resources

ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
LIBRARY = Path(__file__).resolve().parent.parent / "libwsync_cuda.so"

BUDGET = {"issue": 142.0, "alu": 71.0, "lsu": 35.0, "conversion": 18.0}
"""Instructions of a thread for 16 bytes of traffic at the memory roof of an H100 SXM: 3.35 TB/s, 132 SMs, 1.755 GHz."""

STREAM_SHARE = 0.92
"""Assumed share of the nominal bandwidth that a plain copy reaches."""

LATENCY_BYTES = 20_000
"""Bytes that one SM must have on its way: 3.35 TB/s / 132 for 800 ns."""

THREADS = 256
_SOURCES = {"1": "bf16", "2": "f32 rounded", "3": "f16", "4": "f32"}
_RECIPES = {"6": "fp8_channel, table", "7": "fp8_tensor", "8": "mxfp8", "9": "nvfp4"}
_MOVES = {"0": "copy, unpack", "1": "fill", "2": "digest"}
_FLOATS = {"1": "bf16", "2": "f32", "3": "f16"}

_ALU = {
    "IADD3", "LOP3", "SHF", "SEL", "ISETP", "VIADD", "VIMNMX", "VIMNMX3", "LEA", "FSETP", "FMNMX", "FSEL", "PRMT",
    "MOV", "PLOP3", "IABS", "VIADDMNMX", "P2R", "R2P", "CS2R", "IADD", "BMSK", "SGXT", "FMNMX3",
}  # fmt: skip
_LSU = {"LDG", "STG", "LDS", "STS", "SHFL", "REDG", "ATOM", "ATOMG"}
_CONVERSION = {"MUFU", "I2F", "F2I", "F2F", "I2FP", "FCHK"}


def is_payload(instruction: Instruction) -> bool:
    """A 16-byte access of global memory."""
    return instruction.base in ("LDG", "STG") and ".128" in instruction.opcode


def is_generic(instruction: Instruction) -> bool:
    """A load or store whose address space is only known at run time."""
    return instruction.base in ("LD", "ST")


def is_local(instruction: Instruction) -> bool:
    """A load or store of a thread's own memory: a spill, or an array that is indexed at run time."""
    return instruction.base in ("LDL", "STL")


def _is_digest(instruction: Instruction) -> bool:
    return instruction.base == "LOP3" and ", 0x3c," in instruction.operands


def _is_cold(instruction: Instruction) -> bool:
    """What only a bad value or a slow division does."""
    return instruction.base in ("CALL", "REDG", "ATOM", "ATOMG")


def has_fast_path(kernel: str) -> bool:
    """Whether the kernel is one for 16-byte vectors."""
    return not any(
        part in kernel for part in ("words", "elements", "cell_", "scales_", "reset", "GLOBAL", "amax_kernel<0>")
    )


def title(kernel: str) -> str:
    """What a kernel does, in words."""
    name, _, rest = kernel.partition("<")
    arguments = rest.rstrip(">").split(",")
    first = arguments[0]
    if name == "pack_block_kernel":
        return f"pack fp8_block128, {_SOURCES[first]}"
    if name == "pack_channel_kernel":
        return f"pack fp8_channel, {_SOURCES[first]}"
    if name == "pack_rows_kernel":
        return f"pack {_RECIPES[arguments[1]]}, {_SOURCES[first]}"
    if name == "move_kernel":
        return _MOVES[first]
    if name == "round_kernel":
        return f"pack bf16, {_FLOATS[first]}"
    if name == "amax_kernel" and first != "0":
        return f"amax, {8 * int(first)} bits"
    if name == "dequantise_kernel":
        return f"dequantise {'nvfp4' if arguments[1] == '1' else 'fp8'} to {_FLOATS[first]}"
    return "requantise to E8M0" if name == "requantise_kernel" else kernel


def _classes(way: list[Instruction]) -> dict[str, int]:
    counts = {"issue": len(way), "alu": 0, "lsu": 0, "conversion": 0}
    for instruction in way:
        base = instruction.base
        if base in _CONVERSION or (base == "F2FP" and "E4M3" in instruction.opcode):
            counts["conversion"] += 1
        elif base in _LSU:
            counts["lsu"] += 1
        elif base in _ALU or base == "F2FP":
            counts["alu"] += 1
    return counts


def blocks_per_sm(used: Resources, threads: int = THREADS) -> int:
    """Blocks of ``threads`` that the registers and shared memory of an H100's SM hold."""
    registers = -(-used.registers // 8) * 8 * threads
    by_registers = 65536 // registers
    by_shared = 228 * 1024 // (used.shared + 1024)
    return min(by_registers, by_shared, 2048 // threads)


def predict(code: list[Instruction], used: Resources) -> dict[str, Any]:
    """Counts of the payload's loop for 16 bytes of traffic, and the predicted share of an H100's memory roof."""
    way = hot_loop(blocks_of(code), is_payload, _is_digest, _is_cold)
    accesses = sum(is_payload(i) for i in way)
    loads = sum(is_payload(i) and i.base == "LDG" for i in way)
    counts = {name: count / accesses for name, count in _classes(way).items()}
    load = max(counts[name] / BUDGET[name] for name in BUDGET)
    resident = blocks_per_sm(used)
    in_flight = resident * THREADS * 16 * max(loads, accesses - loads)
    return {
        "accesses_per_turn": accesses,
        "per_16_bytes": {name: round(count, 1) for name, count in counts.items()},
        "budget_used": round(load, 3),
        "blocks_per_sm": resident,
        "occupancy": round(resident * THREADS / 2048, 3),
        "bytes_in_flight_per_sm": in_flight,
        "predicted_share_of_memory_roof": round(STREAM_SHARE * min(1.0, 1.0 / load, in_flight / LATENCY_BYTES), 3),
    }


def compiler() -> str:
    """Release of the nvcc that is found first, or an empty string: counts hold for one compiler."""
    path = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if path is None:
        return ""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return text.partition("release ")[2].partition("\n")[0]


def report(library: Path, archs: tuple[str, ...] = ARCHS) -> dict[str, Any]:
    """Resources of every kernel by architecture, and the prediction of sm_90a's code."""
    used = {arch: resources(library, arch) for arch in archs}
    code = functions(library, "sm_90a")
    kernels: dict[str, Any] = {}
    for kernel in sorted(code):
        entry: dict[str, Any] = {"does": title(kernel)}
        entry["resources"] = {arch: vars(used[arch][kernel]) for arch in archs}
        if has_fast_path(kernel):
            entry["h100"] = predict(code[kernel], used["sm_90a"][kernel])
        kernels[kernel] = entry
    return {
        "what": "static counts of machine code; a prediction, nothing was run on a GPU",
        "budget_per_16_bytes": BUDGET,
        "python": platform.python_version(),
        "compiler": compiler(),
        "kernels": kernels,
    }


def table(found: dict[str, Any]) -> str:
    """The prediction as a Markdown table."""
    lines = [
        "| kernel | registers | shared B | occupancy | instructions | ALU | LSU | conversions | budget used "
        "| roof (predicted) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in found["kernels"].values():
        if "h100" not in entry:
            continue
        hot, used = entry["h100"], entry["resources"]["sm_90a"]
        counts = " | ".join(str(hot["per_16_bytes"][name]) for name in ("issue", "alu", "lsu", "conversion"))
        lines.append(
            f"| {entry['does']} | {used['registers']} | {used['shared']} | {hot['occupancy']:.0%} | {counts} "
            f"| {hot['budget_used']:.0%} | {hot['predicted_share_of_memory_roof']:.0%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write the record and the table of a document where asked to."""
    parser = argparse.ArgumentParser(prog="python -m wsync.bench.aot", description="Predictions from machine code")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--markdown", type=Path, help="a document whose table between the aot marks is replaced")
    options = parser.parse_args(arguments)
    found = report(options.library)
    text = table(found)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        before, _, rest = options.markdown.read_text().partition("<!-- aot -->\n")
        after = rest.partition("<!-- /aot -->")[2]
        options.markdown.write_text(f"{before}<!-- aot -->\n{text}\n<!-- /aot -->{after}")


if __name__ == "__main__":
    main()
