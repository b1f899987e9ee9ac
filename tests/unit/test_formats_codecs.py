"""The codecs of small floats over everything that they can be given: e4m3, e2m1 and E8M0."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsync.formats import decode_e2m1, decode_e4m3, decode_e8m0, encode_e2m1, encode_e4m3, encode_e8m0_ceil
from wsync.formats.e2m1 import pack_codes, unpack_codes

ALL_BF16 = torch.from_numpy(np.arange(0x10000, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
FINITE = ALL_BF16[torch.isfinite(ALL_BF16)].to(torch.float32)


def raw(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def test_every_finite_bf16_has_the_e4m3_code_of_torch_and_every_code_decodes_to_itself():
    expected = FINITE.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(raw(encode_e4m3(FINITE)), raw(expected))
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode_e4m3(codes)
    assert torch.equal(
        values.nan_to_num(nan=1e9), codes.view(torch.float8_e4m3fn).to(torch.float32).nan_to_num(nan=1e9)
    )
    finite = codes[~torch.isnan(values)]
    assert torch.equal(raw(encode_e4m3(decode_e4m3(finite))), finite)
    assert len(finite) == 254


def test_e2m1_takes_the_nearest_value_for_every_finite_bf16():
    codes = encode_e2m1(FINITE)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    magnitude = FINITE.to(torch.float64).abs().clamp(max=6)
    distance = (magnitude[:, None] - values).abs()
    got = distance.gather(1, (codes & 7).to(torch.int64)[:, None])[:, 0]
    assert torch.equal(got, distance.amin(dim=1))
    assert torch.equal(codes >> 3 == 1, FINITE < 0)
    assert int(codes.max()) == 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e2m1_ties_go_to_the_even_code_and_their_neighbours_do_not(dtype):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=dtype)
    assert encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    infinity = torch.tensor(float("inf"), dtype=dtype)
    assert encode_e2m1(torch.nextafter(ties, infinity)).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert encode_e2m1(torch.nextafter(ties, -infinity)).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_e2m1_keeps_the_sign_of_a_small_value_but_not_that_of_zero():
    values = torch.tensor([-0.0, 0.0, -1e-30, -(2.0**-149), 1e-30, -7.0, 1e38, float("nan"), float("-inf")])
    assert encode_e2m1(values).tolist() == [0, 0, 8, 8, 0, 15, 7, 0, 15]
    decoded = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert decoded.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.signbit(decoded).tolist() == [False] * 8 + [True] * 8


def test_two_codes_share_a_byte_with_the_even_column_in_the_low_nibble():
    codes = torch.tensor([[1, 2, 15, 0], [0, 9, 3, 12]], dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.tolist() == [[0x21, 0x0F], [0x90, 0xC3]]
    assert torch.equal(unpack_codes(packed), codes)
    everything = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    assert torch.equal(pack_codes(unpack_codes(everything)), everything)


def test_e8m0_bytes_are_the_powers_of_two_of_torch_and_round_up():
    codes = torch.arange(255, dtype=torch.uint8)
    powers = decode_e8m0(codes)
    assert torch.equal(powers, codes.view(torch.float8_e8m0fnu).to(torch.float32))
    assert torch.equal(torch.log2(powers.to(torch.float64)), codes.to(torch.float64) - 127)
    assert bool(torch.isnan(decode_e8m0(torch.tensor([255], dtype=torch.uint8))).all())
    assert torch.equal(encode_e8m0_ceil(powers), codes)
    infinity, zero = torch.tensor(float("inf")), torch.zeros(())
    assert torch.equal(encode_e8m0_ceil(torch.nextafter(powers[:-1], infinity)), codes[1:])
    assert torch.equal(encode_e8m0_ceil(torch.nextafter(powers, zero)), codes)
    assert encode_e8m0_ceil(torch.tensor([0.0, 2.0**-149, 2.0**-128, 2.0**-127])).tolist() == [0, 0, 0, 0]
    magnitudes = FINITE[(FINITE > 2.0**-127) & (FINITE <= 2.0**127)]
    mantissa, exponent = torch.frexp(magnitudes.to(torch.float64))
    expected = exponent - (mantissa == 0.5).to(torch.int32) + 127
    assert torch.equal(encode_e8m0_ceil(magnitudes).to(torch.int32), expected)
