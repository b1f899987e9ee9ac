"""Bugs put into the kernels' sources on purpose: each must be found, and named for what it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import scenarios
from cases import run_cases
from runner_build import CHECKED, CSRC, PLAIN, SANITIZED, Build, build_runner

from wsync.plan import descriptors as d


def packing(*ops: int) -> Callable[[], Iterable[scenarios.Scenario]]:
    return lambda: [s for seed in (0, 1) for s in scenarios.pack_scenarios(seed, ops)]


def bad_values(*ops: int) -> Callable[[], Iterable[scenarios.Scenario]]:
    return lambda: [s for seed in range(4) for s in scenarios.nonfinite_scenarios(seed, ops)]


def seeds(make: Callable[[int], Iterable[scenarios.Scenario]]) -> Callable[[], Iterable[scenarios.Scenario]]:
    return lambda: [s for seed in (0, 1) for s in make(seed)]


BLOCK = packing(d.OP_FP8_BLOCK128)
CHANNEL = packing(d.OP_FP8_CHANNEL)


@dataclass(frozen=True)
class Bug:
    """Exact texts and what replaces them, the calls that meet the bug, and a pattern of what is said of it."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    calls: Callable[[], Iterable[scenarios.Scenario]]
    found: str
    build: Build = CHECKED


def bug(name, file, text, replacement, calls, found, build=CHECKED) -> Bug:
    return Bug(name, ((f"cuda/{file}", text, replacement),), calls, found, build)


BARRIER = "cells[warp_idx()] = value;\n  __syncthreads();"
FAST = [
    bug("dropped barrier", "pack_channel.cuh", BARRIER, BARRIER.split("\n")[0], CHANNEL, "uninitialised|race"),
    bug(
        "a half of the cells used again too early",
        "pack_block.cuh",
        "cells + turn * kWarps",
        "cells",
        BLOCK,
        "race: .*'cells'",
    ),
    bug(
        "a barrier that one warp leaves out",
        "pack_channel.cuh",
        BARRIER,
        BARRIER.replace("__syncthreads", "if (warp_idx() != 3) __syncthreads"),
        CHANNEL,
        "barrier divergence: .*pack_channel.cuh:.*warp.cuh",
        PLAIN,
    ),
    bug(
        "a mask without half of the lanes that call",
        "pack_channel.cuh",
        "value = max_over_lanes(value, kWarp);",
        "value = largest(value, __shfl_xor_sync(0x0000ffffu, value, 1));",
        CHANNEL,
        "bad mask: .*leaves out its own lane 16",
    ),
    bug(
        "a shuffle that idle lanes do not reach",
        "dequantise.cuh",
        "exchange_halves(low, high, odd, halves);",
        "if (own < end) exchange_halves(low, high, odd, halves);",
        seeds(scenarios.transform_scenarios),
        "missing lane",
    ),
    bug(
        "a shared array one too short",
        "pack_channel.cuh",
        "WSYNC_SHARED(uint32_t, cells, 2 * kWarps)",
        "WSYNC_SHARED(uint32_t, cells, 2 * kWarps - 1)",
        CHANNEL,
        "out of bounds: .*'cells'",
    ),
    bug(
        "a row of vectors one too long",
        "pack_block.cuh",
        "cols.begin + col < cols.end",
        "cols.begin + col <= cols.end",
        BLOCK,
        "out of bounds|race|wrong bytes",
    ),
    bug(
        "an element beyond the last",
        "dequantise.cuh",
        "i < unit.x + unit.n; i += kThreads",
        "i <= unit.x + unit.n; i += kThreads",
        seeds(scenarios.transform_scenarios),
        "out of bounds: .*reads 1 bytes at byte .* of 'part 0'",
    ),
    bug(
        "a missing tail",
        "words.cuh",
        "8 * i < filled",
        "8 * i + 8 < filled",
        packing(d.OP_BF16),
        "wrong bytes: byte",
    ),
    bug(
        "vectors of 16 bytes at multiples of 8",
        "program_checks.h",
        "is_vector(uint64_t address) { return address % 16 == 0; }",
        "is_vector(uint64_t address) { return address % 8 == 0; }",
        seeds(scenarios.awkward_scenarios),
        "misaligned: .*accesses 16 bytes .*'source",
    ),
    Bug(
        "units that overlap",
        (
            ("cuda/program_unpack.cpp", "kWordStep = 16 << 10", "kWordStep = 64"),
            ("cuda/program.cpp", "static_cast<uint32_t>(at), 0, n", "static_cast<uint32_t>(at ? at - 1 : 0), 0, n"),
        ),
        seeds(scenarios.unpack_scenarios),
        "race: .*thread .* of another block",
    ),
    bug(
        "non-finite values that nobody looks for",
        "pack_block.cuh",
        "if (max2 >= Source<kSrc>::kNonfinite2) {",
        "if (false) {",
        bad_values(d.OP_FP8_BLOCK128),
        "wrong bytes: first bad element None",
    ),
    bug(
        "a digest key off by one",
        "move.cuh",
        "m.wire_word + 2 * static_cast<uint64_t>(idx)",
        "m.wire_word + 1 + 2 * static_cast<uint64_t>(idx)",
        seeds(scenarios.digest_scenarios),
        "wrong bytes: digest",
    ),
    bug(
        "the scale of another group",
        "pack_rows.cuh",
        "place.col / kNvGroup, scale",
        "place.col / kMxGroup, scale",
        packing(d.OP_NVFP4),
        "race: .*'scales|wrong bytes",
    ),
    bug(
        "a maximum without its atomic",
        "amax.cuh",
        "atomicMax(cell, bits_of(amax_of(d.src_dtype, max2)));",
        "if (*cell < bits_of(amax_of(d.src_dtype, max2))) *cell = bits_of(amax_of(d.src_dtype, max2));",
        seeds(scenarios.amax_scenarios),
        "race: .*'cells'",
    ),
    bug(
        "a phase that is left out",
        "pack_block.cuh",
        "* kScaleBlock - phase",
        "* kScaleBlock - 0 * phase",
        BLOCK,
        "wrong bytes|out of bounds|race",
    ),
    bug(
        "codes of another register",
        "pack_rows.cuh",
        "exchange_halves(codes[2 * store], codes[2 * store + 1], odd, whole)",
        "exchange_halves(codes[2 * store], codes[2 * store], odd, whole)",
        packing(d.OP_MXFP8),
        "wrong bytes",
    ),
    bug(
        "a quotient that loses the sign of zero",
        "codec.cuh",
        "| (bits_of(x) & 0x80000000u)",
        "",
        CHANNEL,
        "wrong bytes",
    ),
    bug(
        "a limit that only one lane of a pair has met",
        "pack_rows.cuh",
        "amax(max_over_lanes(max2, 2)))) {",
        "amax(max2))) {",
        seeds(scenarios.awkward_scenarios),
        "wrong bytes",
    ),
    bug(
        "a dropped barrier in a plain build",
        "pack_channel.cuh",
        BARRIER,
        BARRIER.split("\n")[0],
        CHANNEL,
        "schedule: .* differs|wrong bytes",
        PLAIN,
    ),
    bug(
        "a short shared array under AddressSanitizer",
        "pack_channel.cuh",
        "WSYNC_SHARED(uint32_t, cells, 2 * kWarps)",
        "WSYNC_SHARED(uint32_t, cells, 2 * kWarps - 1)",
        CHANNEL,
        "AddressSanitizer|runtime error",
        SANITIZED,
    ),
]
SLOW = [
    bug(
        "a sum without its atomic",
        "warp.cuh",
        "atomicAdd(&result->digest, total)",
        "result->digest += total",
        BLOCK,
        "race: .*'result'",
    ),
    bug(
        "a stale register",
        "tile.cuh",
        "codes_of<kSrc>(halves[j + 1], quotient, second);",
        "codes_of<kSrc>(halves[j], quotient, second);",
        BLOCK,
        "wrong bytes",
    ),
    Bug(
        "ties rounded away from zero",
        (("core/dtype.h", "magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)", "magnitude + 0x80000u"),),
        packing(d.OP_FP8_TENSOR, d.OP_FP8_BLOCK128),
        "wrong bytes",
    ),
]


def patched(bug: Bug, target):
    """A copy of the sources with the bug in it. A text that is not there exactly once fails the test."""
    shutil.copytree(CSRC, target)
    for file, text, replacement in bug.edits:
        source = (target / file).read_text()
        assert source.count(text) == 1, f"{file} has {source.count(text)} times {text!r}"
        (target / file).write_text(source.replace(text, replacement))
    return target


def check_found(bug: Bug, object_cache, tmp_path):
    runner = build_runner(bug.build, object_cache, patched(bug, tmp_path / "csrc"))
    calls = list(bug.calls())
    outcomes = run_cases(runner, [s.case for s in calls], [s.encoded for s in calls], tmp_path)
    said = [m for m in (s.mistake(o) for s, o in zip(calls, outcomes, strict=False)) if m]
    assert said, "nothing was found"
    assert [m for m in said if re.search(bug.found, m)], said[:5]


@pytest.mark.parametrize("bug", FAST, ids=lambda b: b.name)
def test_a_seeded_bug_is_found_and_named(bug, object_cache, tmp_path):
    check_found(bug, object_cache, tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize("bug", SLOW, ids=lambda b: b.name)
def test_a_seeded_bug_in_what_all_kernels_share_is_found_and_named(bug, object_cache, tmp_path):
    check_found(bug, object_cache, tmp_path)
