"""The machine code of the CUDA kernels keeps its limits, for every architecture, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from wsync.bench import aot, sass
from wsync.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FP8 = ("pack_block", "pack_channel", "pack_rows", "move", "round", "requantise")
MOST_REGISTERS = {
    "pack_block": 128,
    "pack_channel_kernel<4>": 255,
    "pack_channel": 128,
    "pack_rows": 128,
    "move": 80,
    "round": 80,
    "amax": 64,
}
"""What __launch_bounds__ leaves a thread."""


def built_here(folder: Path) -> Path:
    targets = [("80", "80"), ("90a", "90a"), ("100", "100"), ("120", "120")]
    codes = [f"-gencode=arch=compute_{virtual},code=sm_{real}" for virtual, real in targets]
    library = folder / "libwsync_cuda.so"
    command = ["nvcc", "-shared", "-O3", "-std=c++17", "-fmad=false", "-cudart", "shared", "-Xcompiler", "-fPIC"]
    sources = sorted(str(path) for path in (CSRC / "cuda").glob("*.cu"))
    subprocess.run([*command, *codes, f"-I{CSRC}", *sources, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that was built with the extension or, with WSYNC_AOT_BUILD=1, one that is built now (a minute)."""
    try:
        sass.cuobjdump()
    except ConfigError as e:
        pytest.skip(f"{e}")
    if os.environ.get("WSYNC_AOT_BUILD") == "1" and shutil.which("nvcc"):
        return built_here(tmp_path_factory.mktemp("cuda"))
    if not aot.LIBRARY.exists():
        pytest.skip(f"{aot.LIBRARY.name} was not built: no CUDA compiler")
    return aot.LIBRARY


@pytest.fixture(scope="session")
def record(library: Path) -> dict:
    return aot.report(library)


@pytest.fixture(scope="session")
def hopper(library: Path) -> dict[str, list[sass.Instruction]]:
    return sass.functions(library, "sm_90a")


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_no_kernel_spills_or_has_a_stack(record, arch):
    kernels = record["kernels"]
    assert len(kernels) >= 45
    for name, entry in kernels.items():
        used = entry["resources"][arch]
        assert (used["stack"], used["local"]) == (0, 0), name
        most = next((most for kernel, most in MOST_REGISTERS.items() if name.startswith(kernel)), 128)
        assert used["registers"] <= most, name


def test_no_kernel_uses_local_or_generic_memory(hopper):
    for name, code in hopper.items():
        assert not [i for i in code if aot.is_local(i) or aot.is_generic(i)], name


def test_the_payload_of_every_fast_kernel_moves_16_bytes_at_a_time(hopper):
    for name, code in hopper.items():
        if not aot.has_fast_path(name):
            continue
        way = sass.hot_loop(sass.blocks_of(code), aot.is_payload, lambda _: False, lambda i: i.base == "CALL")
        moved = {i.base for i in way if aot.is_payload(i)}
        reads = "LDG" in moved or name == "move_kernel<1>"
        writes = "STG" in moved or name == "move_kernel<2>" or name.startswith("amax")
        assert (reads, writes) == (True, True), name


def test_hopper_converts_e4m3_in_hardware(hopper):
    for name, code in hopper.items():
        if name.startswith(("pack_block", "pack_channel", "requantise")):
            assert any(i.base == "F2FP" and "E4M3" in i.opcode for i in code), name


def test_every_fp8_kernel_stays_within_two_thirds_of_the_instructions_that_an_h100_can_spare(record):
    """A prediction from counts, see docs/kernels.md; nvfp4 has no conversion on Hopper and is over."""
    for name, entry in record["kernels"].items():
        hot = entry.get("h100")
        if hot is None or not name.startswith(FP8) or "nvfp4" in entry["does"]:
            continue
        assert hot["budget_used"] <= 2 / 3, name
        assert hot["bytes_in_flight_per_sm"] >= aot.LATENCY_BYTES, name
        assert hot["predicted_share_of_memory_roof"] >= 0.85, name


def test_the_way_through_a_loop_takes_the_payload_and_leaves_the_cold_block():
    def line(address, opcode, operands=""):
        return sass.Instruction(address, opcode, operands, False)

    code = [
        line(0x00, "MOV"),
        line(0x10, "LDG.E.128"),
        line(0x20, "BRA", "P0, 0x60"),
        line(0x30, "CALL", "0x90"),
        line(0x40, "FMUL"),
        line(0x50, "BRA", "0x60"),
        line(0x60, "STG.E.128"),
        line(0x70, "BRA", "P1, 0x10"),
        line(0x80, "EXIT"),
    ]
    way = sass.hot_loop(sass.blocks_of(code), aot.is_payload, lambda _: False, lambda i: i.base == "CALL")
    assert [i.address for i in way] == [0x10, 0x20, 0x60, 0x70]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN5wsync4cuda16pack_rows_kernelILi1ELi6EEEvPK", "pack_rows_kernel<1,6>"),
        ("_ZN5wsync4cuda11move_kernelILNS0_4MoveE2EEEvPK", "move_kernel<2>"),
        ("_ZN5wsync4cuda17dequantise_kernelILi2ELb1EEEvPK", "dequantise_kernel<2,1>"),
        ("_ZN5wsync4cuda13scales_kernelEPK", "scales_kernel"),
    ],
)
def test_kernels_have_readable_names(symbol, name):
    assert sass.kernel_name(symbol) == name


def test_the_document_shows_the_committed_record():
    committed = json.loads((ROOT / "bench" / "records" / "kernels_aot.json").read_text())
    assert aot.table(committed) in (ROOT / "docs" / "kernels.md").read_text()


def test_the_committed_record_is_that_of_this_code(library, record):
    committed = json.loads((ROOT / "bench" / "records" / "kernels_aot.json").read_text())
    if committed["compiler"] != record["compiler"]:
        pytest.skip(f"the record is of nvcc {committed['compiler']!r}, the library of {record['compiler']!r}")
    assert record["kernels"] == committed["kernels"], "run python -m wsync.bench.aot --json --markdown again"
