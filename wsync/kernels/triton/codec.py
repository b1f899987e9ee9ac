"""Codecs and scale rules as Triton functions: the twins of ``csrc/core/dtype.h``, bit for bit.

Values travel as the bits of an f32 in uint32 and in pairs of neighbouring columns (``even``, ``odd``), because the
hardware converts two at a time. ``ARCH`` is the compute capability (80, 90, ...) and 0 in Triton's interpreter, whose
own float casts round wrongly: there, and before sm_89, the codecs are integer arithmetic. Divisions are `tl.div_rn`,
the one that rounds as IEEE 754 says; ``/`` is approximate on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_ARCH = tl.constexpr(89)
"""The first architecture that converts f32 to e4m3."""
E2M1_ARCH = tl.constexpr(100)
"""The first one that converts f32 to e2m1."""

INFINITY_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
UPPER_HALF = tl.constexpr(0xFFFF0000)
LEAST_CHANNEL_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))


@triton.jit
def bits_of(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def f32_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_code(value):
    """e4m3fn code of an f32: saturating, to nearest, ties to even, -0 kept."""
    bits = bits_of(value)
    magnitude = tl.minimum(bits & MAGNITUDE, 0x43E00000)
    # Below 2^-6 the step is 2^-9 = ulp(2^14): adding 2^14 rounds there. Above, drop 20 mantissa bits and rebias.
    small = bits_of(f32_of(magnitude) + 16384.0) - 0x46800000
    large = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    return tl.where(magnitude < 0x3C800000, small, large) | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_pair(even, odd, ARCH: tl.constexpr):
    """Two codes in the low 16 bits, that of ``even`` in the lower byte."""
    if ARCH >= E4M3_ARCH:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f", [odd, even], dtype=tl.uint16, is_pure=True, pack=1
        )
        codes = pair.to(tl.uint32)
    else:
        codes = e4m3_code(even) | (e4m3_code(odd) << 8)
    return codes


@triton.jit
def f32_of_e4m3(code):
    """The value of a positive e4m3 code below 0x7f."""
    small = code.to(tl.float32) * 0.001953125
    large = f32_of((code << 20) + (120 << 23))
    return tl.where(code < 8, small, large)


@triton.jit
def e2m1_code(value):
    """e2m1 code of an f32: to nearest, ties to even, saturating at 6; -0 loses its sign, a small negative keeps it."""
    bits = bits_of(value)
    magnitude = tl.minimum(bits & MAGNITUDE, 0x40C00000)
    # Below 1 the step is 0.5 = ulp(2^22); above, one mantissa bit is kept.
    small = bits_of(f32_of(magnitude) + 4194304.0) - 0x4A800000
    large = ((magnitude + 0x1FFFFF + ((magnitude >> 22) & 1)) >> 22) - 252
    code = tl.where(magnitude < 0x3F800000, small, large)
    return code | tl.where(bits > 0x80000000, 8, 0).to(tl.uint32)


@triton.jit
def e2m1_magnitude(value):
    """e2m1 code, without its sign, of values that are not negative and less than 7; to nearest, ties to even."""
    # Adding 2^22 times the power of two below the value (1 at least) rounds it to one bit after its first.
    exponent = bits_of(tl.maximum(value, 1.0)) & INFINITY_BITS
    magic = exponent + (22 << 23)
    return bits_of(value + f32_of(magic)) - (magic - (exponent >> 22) + 254)


@triton.jit
def e2m1_pair(even, odd, ARCH: tl.constexpr):
    """One byte: the code of ``even`` in the low nibble."""
    if ARCH >= E2M1_ARCH:
        # + 0.0 turns -0 into 0, as the recipe has it; the hardware would keep its sign.
        codes = tl.inline_asm_elementwise(
            "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, $1, $2; cvt.u32.u8 $0, t; }",
            "=r,f,f",
            [odd + 0.0, even + 0.0],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        codes = e2m1_code(even) | (e2m1_code(odd) << 4)
    return codes


@triton.jit
def bf16_rounded(bits):
    """Bits of an f32 rounded to bf16, ties to even, in the upper half. Not for what is not finite."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & UPPER_HALF


@triton.jit
def bf16_pair(even, odd, ARCH: tl.constexpr):
    """Two f32 (as bits) rounded to bf16, that of ``even`` in the lower half."""
    if ARCH > 0:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [odd, even], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        pair = (bf16_rounded(even) >> 16) | bf16_rounded(odd)
    return pair


@triton.jit
def scale_f32(amax):
    """Recipe fp8_block128_f32."""
    return tl.div_rn(tl.maximum(amax, 1e-4), 448.0)


@triton.jit
def scale_pow2(amax):
    """Recipe fp8_block128: the power of two at or above amax / 448."""
    bits = bits_of(scale_f32(amax))
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
    return f32_of(tl.minimum(tl.maximum(exponent, 1), 254) << 23)


@triton.jit
def scale_channel(amax):
    """Recipe fp8_channel: at least 1 / (448 * 512)."""
    return tl.maximum(tl.div_rn(amax, 448.0), LEAST_CHANNEL_SCALE)


@triton.jit
def multiplier_tensor(amax):
    """What recipe fp8_tensor multiplies by."""
    return tl.div_rn(1.0, tl.maximum(amax, 1e-12)) * 448.0


@triton.jit
def scale_mxfp8(amax):
    """E8M0 byte of recipe mxfp8 (RCEIL), in uint32."""
    bits = bits_of(tl.div_rn(amax, 448.0))
    exponent = bits >> 23
    normal = exponent + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
    subnormal = (bits > 0x400000).to(tl.uint32)
    return tl.where(exponent == 0, subnormal, normal)


@triton.jit
def reciprocal_e8m0(exponent):
    """2^(127 - exponent); exact, also where it is subnormal."""
    return f32_of(tl.where(exponent == 254, 0x400000, (254 - exponent) << 23))


@triton.jit
def scale2_nvfp4(amax):
    """``weight_scale_2`` of recipe nvfp4."""
    scale2 = tl.div_rn(amax, 2688.0)
    return tl.where(scale2 == 0.0, 1.0, scale2)


@triton.jit
def scale_nvfp4(block_amax, scale2):
    """e4m3 code of a block's scale, in uint32."""
    return code_of_scale(tl.div_rn(block_amax, 6.0 * scale2))


@triton.jit
def code_of_scale(scale):
    scale = tl.where(scale == 0.0, 1.0, scale)
    return e4m3_code(tl.minimum(tl.maximum(scale, 0.001953125), 448.0))


@triton.jit
def scale_nvfp4_safe(block_amax, scale2, tensor_amax):
    """The same for the scales that `exact_quotient` divides by; a block above its tensor's amax gets 448 either way."""
    divisor = 6.0 * scale2
    return code_of_scale(exact_quotient(tl.minimum(block_amax, tensor_amax), divisor, tl.div_rn(1.0, divisor)))


@triton.jit
def exact_quotient(value, divisor, reciprocal):
    """``value / divisor`` rounded once, from ``reciprocal = div_rn(1, divisor)``, in five operations.

    Two steps of Newton: the first leaves less than one ulp of error, and from there the second is correctly rounded
    (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990, theorem 8.1). Asks
    that quotient and reciprocal be finite and that no residual be subnormal, or that the quotient be so small that it
    encodes as 0 either way. The sign of a zero is lost.
    """
    quotient = value * reciprocal
    quotient = tl.fma(tl.fma(-quotient, divisor, value), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, divisor, value), reciprocal, quotient)


@triton.jit
def signed_quotient(value, divisor, reciprocal):
    """The same with the value's sign; divisors are positive."""
    return f32_of(bits_of(exact_quotient(value, divisor, reciprocal)) | (bits_of(value) & 0x80000000))


@triton.jit
def e2m1_quotient(value, divisor, reciprocal, most):
    """e2m1 code of ``value / divisor`` for divisors below 2, so that no quotient loses its sign by underflow.

    Values are cut at ``most``, 6.5 times the divisor, which encodes as 6.
    """
    magnitude = tl.minimum(tl.abs(value), most)
    code = e2m1_magnitude(exact_quotient(magnitude, divisor, reciprocal))
    return code + tl.where(value < 0.0, 8, 0).to(tl.uint32)
