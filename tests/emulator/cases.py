"""Cases for the runner: descriptors with the arrays that they point into, and what comes out."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CALLS = ("pack", "amax", "scales", "unpack", "installed", "transform", "digest")
NO_BAD = 2**64 - 1
ELEMENT_BITS = 40


@dataclass
class Case:
    """One call. Descriptors hold addresses within ``buffers``; the runner works on copies of them."""

    call: str
    descs: np.ndarray
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    base: int = 0

    def encode(self) -> bytes:
        parts = [struct.pack("<QQQ", CALLS.index(self.call), self.base, len(self.descs)), _block(self.descs.tobytes())]
        buffers = [(n, a, 0) for n, a in self.inputs.items()] + [(n, a, 1) for n, a in self.outputs.items()]
        parts.append(struct.pack("<Q", len(buffers)))
        for name, array, writable in buffers:
            parts += [_block(name.encode()), struct.pack("<QQ", array.ctypes.data, writable), _block(memory(array))]
        return b"".join(parts)


@dataclass
class Outcome:
    failure: str
    digest: int
    bad: tuple[int, int] | None
    """(descriptor, element)."""
    contents: dict[str, bytes]
    """Of the outputs."""


def memory(array: np.ndarray) -> bytes:
    """The bytes of an array that is contiguous in memory, whatever its dtype."""
    if not array.flags.c_contiguous:
        raise ValueError("a buffer of a case must be contiguous")
    return array.tobytes()


def _block(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        return value

    def block(self) -> bytes:
        n = self.number()
        self.at += n
        return self.data[self.at - n : self.at]


def _outcome(case: Case, reader: _Reader) -> Outcome:
    failure, digest, bad = reader.block().decode(), reader.number(), reader.number()
    contents = [reader.block() for _ in range(reader.number())]
    found = None if bad == NO_BAD else (bad >> ELEMENT_BITS, bad & ((1 << ELEMENT_BITS) - 1))
    return Outcome(failure, digest, found, dict(zip([*case.inputs, *case.outputs], contents, strict=False)))


def run_cases(
    runner: Path, cases: Sequence[Case], encoded: Sequence[bytes], scratch: Path, seed: int = 0
) -> list[Outcome]:
    """Outcomes of all cases up to the one where the runner died, whose failure is what it said then."""
    given, out = scratch / "cases.bin", scratch / "outcomes.bin"
    given.write_bytes(b"".join(encoded))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(runner), str(given), str(out), str(seed)], capture_output=True, env=environment)
    reader = _Reader(out.read_bytes())
    outcomes = []
    for case in cases:
        if reader.at == len(reader.data):
            break
        outcomes.append(_outcome(case, reader))
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace")
        outcomes.append(Outcome(f"died with {done.returncode}: {words}", 0, None, {}))
    return outcomes
