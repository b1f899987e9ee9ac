// Codes of values, and exact quotients at the price of two fused multiply-adds.
#pragma once

#include "cuda/source.cuh"

namespace wsync {
namespace cuda {

// x / s, rounded to nearest, for many x and one s. With r = RN(1 / s) and q0 = RN(x r), which is off by less than an
// ulp, the remainder x - q0 s is exact and RN(q0 + remainder r) is RN(x / s), as long as nothing under- or overflows.
// Source: Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, theorem 8.1.
//
// For e4m3 a quotient below 2^-11 only needs to stay below it, and one beyond 448 only needs to stay beyond it. The
// remainder of a quotient of at least 2^-11 is a multiple of 2^-34 ulp(s), so that kLeast keeps it exact; where the
// scale is outside, or a quotient could reach kMost, the division is the hardware's.
struct Quotient {
  float divisor;
  float reciprocal;
  bool fast;

  static constexpr float kLeast = 0x1p-60f;
  static constexpr float kMost = 0x1p120f;

  explicit __device__ __forceinline__ Quotient(float s)
      : divisor(s), reciprocal(div_rn(1.0f, s)), fast(s >= kLeast && s <= kMost) {}

  __device__ __forceinline__ float fast_of(float x) const {
    const float q0 = mul_rn(x, reciprocal);
    const float remainder = fma_rn(-q0, divisor, x);
    return fma_rn(remainder, reciprocal, q0);
  }
};

}  // namespace cuda
}  // namespace wsync
