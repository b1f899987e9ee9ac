"""Every value that is not finite is found, wherever it lies in a vector, and the largest finite ones are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_boxes import ISAS, amax_desc, bucket, pack_desc

from wsync import kernels
from wsync.plan import descriptors as d

OPS = {
    "copy": d.OP_COPY,
    "bf16": d.OP_BF16,
    "fp8_block128": d.OP_FP8_BLOCK128,
    "fp8_channel": d.OP_FP8_CHANNEL,
    "fp8_channel of a table": d.OP_FP8_CHANNEL_SCALED,
    "fp8_tensor": d.OP_FP8_TENSOR,
    "mxfp8": d.OP_MXFP8,
    "nvfp4": d.OP_NVFP4,
    "amax": None,
}
COLS = 160  # whole vectors, and a rest, of every instruction set


class Packs:
    """One row of values that are packed by one operation, or whose amax is taken."""

    def __init__(self, op: int | None, dtype: torch.dtype, src_dtype: int, isa: str) -> None:
        self.row = torch.ones(1, COLS, dtype=dtype)
        self.bits = self.row.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        self.op, self.isa = op, isa
        self.table = torch.ones(1, COLS)
        self.out = bucket(COLS * 8)
        if op is None:
            self.descs = amax_desc(self.row, self.table, self.table, (0, 0), d.OP_FP8_TENSOR, src_dtype)
        else:
            self.descs = pack_desc(self.row, op, scales=self.table, amax=self.table, src_dtype=src_dtype)

    def bad(self, at: int, pattern: int) -> tuple[int, int] | None:
        before = self.bits[0, at].item()
        self.bits[0, at] = pattern
        self.table.fill_(1.0)
        if self.op is None:
            found = kernels.amax(self.descs, 1, isa=self.isa)
        else:
            found = kernels.pack(self.descs, self.out.ctypes.data, 1, isa=self.isa).bad
        self.bits[0, at] = before
        return found


def signed(pattern: int, num_bytes: int) -> int:
    return int(np.array(pattern, f"u{num_bytes}").view(f"i{num_bytes}"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "src_dtype", "infinity"), [(torch.bfloat16, d.SRC_BF16, 0x7F80), (torch.float16, d.SRC_F16, 0x7C00)]
)
def test_every_pattern_of_16_bits_that_is_no_finite_number_is_found(op, dtype, src_dtype, infinity, isa):
    packs = Packs(OPS[op], dtype, src_dtype, isa)
    for magnitude in range(infinity, 0x8000):
        at = magnitude * 37 % COLS
        for pattern in (magnitude, magnitude | 0x8000):
            assert packs.bad(at, signed(pattern, 2)) == (0, at), hex(pattern)
    for at in range(COLS):
        assert packs.bad(at, signed(infinity, 2)) == (0, at)
        assert packs.bad(at, infinity - 1) is None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "as_given"), [(op, g) for op in OPS for g in (False, True) if g or op != "copy"])
def test_a_wide_value_is_bad_from_where_it_or_its_rounding_is_infinite(op, as_given, isa):
    rounds = not as_given or op == "bf16"
    first_bad = 0x7F7F8000 if rounds else 0x7F800000
    packs = Packs(OPS[op], torch.float32, d.SRC_F32_EXACT if as_given else d.SRC_F32, isa)
    for at in range(COLS):
        for pattern in (first_bad, 0xFF800000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF):
            assert packs.bad(at, signed(pattern, 4)) == (0, at), hex(pattern)
        for pattern in (first_bad - 1, (first_bad - 1) | 0x80000000):
            assert packs.bad(at, signed(pattern, 4)) is None, hex(pattern)


@pytest.mark.parametrize("isa", ISAS)
def test_copies_of_f64_look_at_the_exponent_alone(isa):
    packs = Packs(d.OP_COPY, torch.float64, d.SRC_F64, isa)
    for at in range(COLS):
        for pattern in (0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, (1 << 64) - 1):
            assert packs.bad(at, signed(pattern, 8)) == (0, at), hex(pattern)
        for pattern in ((0x7FF << 52) - 1, (0xFFF << 52) - 1, 0xFFFFFFFF):
            assert packs.bad(at, signed(pattern, 8)) is None, hex(pattern)
