"""One call with what the CPU kernels answer, and memory for it that begins where a device's would."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cases import Case, Outcome
from torch import Tensor


@dataclass
class Scenario:
    """An encoded case and the answer: a digest, the first bad element, and the bytes of every output."""

    name: str
    encoded: bytes
    case: Case
    digest: int
    bad: tuple[int, int] | None
    initial: dict[str, bytes]
    expected: dict[str, bytes]

    def mistake(self, outcome: Outcome) -> str:
        """What is wrong with an outcome, or an empty string."""
        if outcome.failure:
            return f"{self.name}: {outcome.failure}"
        if outcome.bad != self.bad:
            return f"{self.name}: wrong bytes: first bad element {outcome.bad}, but the CPU finds {self.bad}"
        if self.bad is not None:
            return ""  # the bytes are unspecified
        if outcome.digest != self.digest:
            return f"{self.name}: wrong bytes: digest {outcome.digest:#x}, but the CPU has {self.digest:#x}"
        for name, want in self.expected.items():
            if outcome.contents[name] != want:
                got = np.frombuffer(outcome.contents[name], np.uint8)
                at = int(np.flatnonzero(got != np.frombuffer(want, np.uint8))[0])
                return f"{self.name}: wrong bytes: byte {at} of {name!r} is {got[at]:#x}, but the CPU has {want[at]:#x}"
        return ""


def aligned(numel: int, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """A tensor that begins on a multiple of 256 bytes, as memory of a device does."""
    raw = torch.empty(numel + 256 // dtype.itemsize + 1, dtype=dtype)
    start = -raw.data_ptr() % 256 // dtype.itemsize
    return (
        torch.from_numpy(raw.view(torch.uint8).numpy()[start * dtype.itemsize :][: numel * dtype.itemsize])
        .view(dtype)
        .fill_(fill)
    )


def at_aligned(tensor: Tensor) -> Tensor:
    """The same values and strides in storage that begins on a multiple of 256 bytes."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return (
        aligned(whole.numel(), tensor.dtype)
        .copy_(whole)
        .as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    )


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as bytes, at its own address."""
    return tensor.view(-1).view(torch.uint8).numpy()


def span_of(tensor: Tensor) -> np.ndarray:
    """The memory from a strided tensor's first element to its last: what a kernel may read, and not a byte more."""
    numel = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return bytes_of(tensor.as_strided((numel,), (1,)))


def finish(name: str, case: Case, run: object) -> Scenario:
    """The scenario of a case: ``run`` calls the CPU kernel, which writes to the outputs."""
    encoded, initial = case.encode(), {n: a.tobytes() for n, a in case.outputs.items()}
    answer = run() if callable(run) else run
    digest, bad = 0, None
    if case.call in ("unpack", "installed", "digest"):
        digest = int(answer)
    elif case.call == "pack":
        digest, bad = answer
    elif case.call in ("amax", "transform"):
        bad = answer
    return Scenario(name, encoded, case, digest, bad, initial, {n: a.tobytes() for n, a in case.outputs.items()})


def name_of(*parts: object) -> str:
    return " ".join(str(p) for p in parts)
