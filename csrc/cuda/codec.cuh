// Codes of values, and exact quotients at the price of two fused multiply-adds.
#pragma once

#include "cuda/source.cuh"

namespace wsync {
namespace cuda {

// x / s for many x and one s, close enough to rounded that the codes are those of RN(x / s): with r = RN(1 / s) and
// q0 = RN(x r), RN(q0 + (x - q0 s) r) is RN(x / s) where q0 is within an ulp, as long as nothing under- or overflows.
// q0 can be off by more and the remainder then rounds; a test goes through every significand of s at every boundary of
// e4m3 and e2m1. Source: Markstein, Computation of elementary functions on the IBM RISC System/6000 processor,
// theorem 8.1.
//
// A quotient below 2^-11 becomes a zero of its sign in every code here, exact or not. One of at least 2^-11 has a
// remainder that is a multiple of 2^-34 ulp(s), which kLeast keeps representable.
struct Quotient {
  float divisor;
  float reciprocal;

  static constexpr float kLeast = 0x1p-60f;
  static constexpr float kMost = 0x1p120f;

  explicit __device__ __forceinline__ Quotient(float s) : divisor(s), reciprocal(div_rn(1.0f, s)) {}

  // Whether of() is good for values up to `amax`: it always is for a scale made from it.
  __device__ __forceinline__ bool good_for(float amax) const {
    return divisor >= kLeast && divisor <= kMost && mul_rn(amax, reciprocal) <= 0x1p20f;
  }

  // Good but for the sign of a zero: the additions turn -0 into +0.
  __device__ __forceinline__ float of_nonzero(float x) const {
    const float q0 = mul_rn(x, reciprocal);
    const float remainder = fma_rn(-q0, divisor, x);
    return fma_rn(remainder, reciprocal, q0);
  }

  // The divisor is positive, so the sign is that of x.
  __device__ __forceinline__ float of(float x) const {
    return f32_of(bits_of(of_nonzero(x)) | (bits_of(x) & 0x80000000u));
  }
};

// The e2m1 code of a magnitude. Adding 2^22 times its binade (at least 1, at most 4) rounds it, ties to even, to steps
// of half the binade, which the low bits of the sum then count.
__device__ __forceinline__ uint32_t e2m1_of_magnitude(float magnitude) {
  const float limited = min_f32(magnitude, 6.0f);
  const uint32_t binade = largest(bits_of(limited) & 0x7f800000u, 0x3f800000u);
  const uint32_t magic = binade + (22u << 23);
  return bits_of(limited + f32_of(magic)) - magic + ((binade - 0x3f800000u) >> 22);
}

// |quotient| and the sign bit of an e2m1 code. The sign is that of RN(x / s) < 0, so that a negative x so small that
// the quotient rounds to zero has none: x has to lie beyond s 2^-150, which is `least` units of 2^-149.
__device__ __forceinline__ uint32_t e2m1_sign_limit(float s) { return 0x80000000u + static_cast<uint32_t>(0.5f * s); }

__device__ __forceinline__ uint32_t e2m1_of_quotient(float x, float quotient, uint32_t sign_limit) {
  const uint32_t code = e2m1_of_magnitude(abs_f32(quotient));
  return bits_of(x) > sign_limit ? code | 8u : code;
}

}  // namespace cuda
}  // namespace wsync
