// From floats to codes of 8 and 4 bits, a vector at a time. Include after a header that defines V.
#pragma once

#include "core/dtype.h"

namespace wsync {
namespace {

// e4m3 of 16-bit floats (bf16, or f32 cut to 16 bits with a sticky last bit) divided by a power of two. e4m3 keeps 3 of
// the 7 mantissa bits, so subtracting the exponent and dropping 4 bits with RNE is the whole conversion, but for
// results below 2^-6 (about 1 in 10,000 weights).
class CodeMaker {
 public:
  // `exponent`: the exponent bits of the power of two.
  explicit CodeMaker(uint32_t exponent)
      : offset_(V::set16(7u - ((exponent - 7u) << 7))), least_(V::set16((exponent - 6u) << 7)) {
    for (int k = 1; k <= 8; ++k) {
      // Halfway between k - 1 and k steps of 2^-9; a tie goes to the even one, so for even k the halfway point counts.
      const uint32_t halfway = bits_of((static_cast<float>(k) - 0.5f) * 0x1p-9f) + ((exponent - 127u) << 23);
      step_at_[k - 1] = static_cast<uint16_t>((halfway >> 16) - (k % 2 == 0 ? 1u : 0u));
    }
  }

  // A vector of codes of x0 and x1, whose magnitudes make at most 448 (1 + 2^-20).
  inline V::I operator()(V::I x0, V::I x1) const {
    V::I q0 = round(x0);
    V::I q1 = round(x1);
    const V::I magnitude = V::set16(0x7fff);
    const V::I a0 = V::and_(x0, magnitude);
    const V::I a1 = V::and_(x1, magnitude);
    if (__builtin_expect(V::any(V::gt16(least_, V::min_u16(a0, a1))), 0)) {
      q0 = patch_subnormals(x0, a0, q0);
      q1 = patch_subnormals(x1, a1, q1);
    }
    // Low byte + 16 * high byte brings the sign from bit 11 to bit 7.
    return V::bytes(V::fold16(q0), V::fold16(q1));
  }

 private:
  inline V::I round(V::I x) const {
    const V::I odd = V::and_(V::srl16<4>(x), V::set16(1));
    return V::srl16<4>(V::add16(V::add16(x, offset_), odd));
  }

  // Results as 16-bit lanes, sign at bit 11; `normal` is good where the magnitude is at least least_.
  __attribute__((noinline, cold)) V::I patch_subnormals(V::I x, V::I magnitude, V::I normal) const {
    V::I code = V::zero();
    for (const uint16_t step : step_at_) code = V::increment16(code, V::gt16(magnitude, V::set16(step)));
    const V::I sign = V::sll16<11>(V::srl16<15>(x));
    return V::select16(V::gt16(least_, magnitude), V::or_(code, sign), normal);
  }

  V::I offset_;          // half of what is dropped, less the exponent at its place in 16 bits
  V::I least_;           // smallest magnitude with a normal result
  uint16_t step_at_[8];  // a subnormal result is the number of these that the magnitude exceeds
};

// Magnitudes above 448 (NaN too) become 448, signs stay.
inline V::I saturate_e4m3(V::I x) {
  const V::I sign = V::set16(0x8000);
  return V::or_(V::and_(x, sign), V::min_u16(V::andnot(sign, x), V::set16(0x43e0)));
}

// e4m3 of f32, in 32-bit lanes; magnitudes above 448 (NaN too) become 448.
inline V::I e4m3_lanes(V::F value) {
  const V::I bits = V::as_i(value);
  const V::I a = V::min_u32(V::and_(bits, V::set32(0x7fffffff)), V::set32(0x43e00000));
  const V::I odd = V::and_(V::srl32<20>(a), V::set32(1));
  const V::I rounded = V::srl32<20>(V::add32(V::add32(a, V::set32(0x7ffff)), odd));
  const V::I normal = V::sub32(rounded, V::set32(960));
  // Below 2^-6 the step is 2^-9 = ulp(2^14): adding 2^14 rounds there.
  const V::I subnormal = V::sub32(V::as_i(V::add(V::as_f(a), V::set_f(16384.0f))), V::set32(0x46800000));
  const V::I sign = V::and_(V::srl32<24>(bits), V::set32(0x80));
  return V::or_(V::select_lt32(a, V::set32(0x3c800000), subnormal, normal), sign);
}

// The values of positive e4m3 codes in 32-bit lanes.
inline V::F f32_of_e4m3_lanes(V::I code) {
  const V::I normal = V::add32(V::sll32<20>(code), V::set32(120u << 23));
  const V::I subnormal = V::as_i(V::mul(V::to_f(code), V::set_f(0x1p-9f)));
  return V::as_f(V::select_lt32(code, V::set32(8), subnormal, normal));
}

// e2m1 of 16-bit floats with a sticky last bit, in 16-bit lanes. NaN becomes 0, -0 loses its sign.
inline V::I e2m1_lanes(V::I x) {
  const V::I magnitude = V::and_(x, V::set16(0x7fff));
  V::I code = V::increment16(V::zero(), V::gt16(magnitude, V::set16(0x3e80)));  // 0.25
  code = V::increment16(code, V::gt16(magnitude, V::set16(0x3f3f)));            // at least 0.75
  code = V::increment16(code, V::gt16(magnitude, V::set16(0x3fa0)));            // 1.25
  code = V::increment16(code, V::gt16(magnitude, V::set16(0x3fdf)));            // at least 1.75
  code = V::increment16(code, V::gt16(magnitude, V::set16(0x4020)));            // 2.5
  code = V::increment16(code, V::gt16(magnitude, V::set16(0x405f)));            // at least 3.5
  code = V::increment16(code, V::gt16(magnitude, V::set16(0x40a0)));            // 5
  const V::Mask16 negative = V::both(V::gt16(V::zero(), x), V::gt16(x, V::set16(0x8000)));
  code = V::or_(code, V::keep16(negative, V::set16(8)));
  return V::keep16(V::gt16(V::set16(0x7f81), magnitude), code);
}

}  // namespace
}  // namespace wsync
