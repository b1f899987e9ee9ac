"""The exact quotients of `csrc/cuda/codec.cuh`: the code of every value beside a boundary is that of true division."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest

BOUNDARIES = np.arange(16, 32, dtype=np.float32) / np.float32(16)
"""Significands of all values that lie halfway between two codes of e4m3 or e2m1, subnormal ones included."""


def by_multiplication(x, s):
    """RN(q0 + RN(x - q0 s) r) with r = RN(1 / s), q0 = RN(x r); the products are exact in f64, the last sum is not."""
    r = np.float32(1) / s
    q0 = x * r
    wide = np.float64
    remainder = (x.astype(wide) - q0.astype(wide) * s.astype(wide)).astype(np.float32)
    return (q0.astype(wide) + remainder.astype(wide) * r.astype(wide)).astype(np.float32)


def nearest_f32(value):
    """f32 nearest to a fraction, ties to even."""
    near = np.float32(float(value))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.uint32)) & 1))


def exactly_by_multiplication(x, s):
    """The same for one value, with fractions: what two fused multiply-adds give."""
    r = np.float32(1) / s
    q0 = x * r
    exact = [Fraction(float(v)) for v in (x, s, r, q0)]
    remainder = Fraction(float(nearest_f32(exact[0] - exact[3] * exact[1])))
    return nearest_f32(exact[3] + remainder * exact[2])


def sides_differ(significands):
    """Of the values nearest to boundary x s: how many quotients lie on another side of it than x / s rounded."""
    s = (np.asarray(significands, np.uint32) | np.uint32(127 << 23)).view(np.float32)
    wrong = 0
    for boundary in BOUNDARIES:
        nearest = (boundary * s).view(np.int32)
        for ulps in (-2, -1, 0, 1, 2):
            x = (nearest + np.int32(ulps)).view(np.float32)
            side = np.sign(x / s - boundary)
            for i in np.flatnonzero(np.sign(by_multiplication(x, s) - boundary) != side):  # f64 may round twice
                wrong += int(np.sign(exactly_by_multiplication(x[i], s[i]) - boundary) != side[i])
    return wrong


def test_quotients_of_many_divisors_lie_on_the_side_of_true_division():
    rng = np.random.default_rng(0)
    assert sides_differ(np.concatenate([rng.integers(0, 1 << 23, 20_000), (1 << 23) - 1 - np.arange(20_000)])) == 0


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("WSYNC_DEEP") != "1", reason="WSYNC_DEEP=1 asks for every divisor")
def test_quotients_of_every_divisor_lie_on_the_side_of_true_division():
    step = 1 << 20
    assert sum(sides_differ(np.arange(at, at + step)) for at in range(0, 1 << 23, step)) == 0


def test_a_reciprocal_alone_would_not_do():
    s = (np.random.default_rng(1).integers(0, 1 << 23, 20_000).astype(np.uint32) | np.uint32(127 << 23)).view(
        np.float32
    )
    differs = 0
    for boundary in BOUNDARIES:
        x = boundary * s
        differs += int((np.sign(x * (np.float32(1) / s) - boundary) != np.sign(x / s - boundary)).sum())
    assert differs > 0
