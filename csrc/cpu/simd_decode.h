// From codes back to f32. Include after simd_codes.h.
#pragma once

#include <cstring>

#include "core/dtype.h"

namespace wsync {
namespace {

// The values of any e4m3 codes in 32-bit lanes.
inline V::F signed_f32_of_e4m3_lanes(V::I code) {
  const V::I magnitude = V::and_(code, V::set32(0x7f));
  const V::I finite = V::as_i(f32_of_e4m3_lanes(magnitude));
  const V::I value = V::select_lt32(magnitude, V::set32(0x7f), finite, V::set32(0x7fc00000));
  return V::as_f(V::or_(value, V::sll32<24>(V::and_(code, V::set32(0x80)))));
}

struct E4m3Codes {
  static constexpr int kCodesPerByte = 1;
  static inline V::F values(const uint8_t* codes) { return signed_f32_of_e4m3_lanes(V::widen_bytes(codes)); }
};

struct E2m1Codes {
  static constexpr int kCodesPerByte = 2;
  static inline V::F values(const uint8_t* codes) { return V::e2m1_values(V::widen_nibbles(codes)); }
};

template <typename Codes>
void decode(float* out, const uint8_t* codes, size_t n, float scale) {
  const V::F by = V::set_f(scale);
  size_t i = 0;
  for (; i + V::kLanes32 <= n; i += V::kLanes32) {
    V::store_f(out + i, V::mul(Codes::values(codes + i / Codes::kCodesPerByte), by));
  }
  if (i == n) return;
  alignas(64) uint8_t in[V::kLanes32] = {};
  alignas(64) float values[V::kLanes32];
  std::memcpy(in, codes + i / Codes::kCodesPerByte, (n - i) / Codes::kCodesPerByte);
  V::store_f(values, V::mul(Codes::values(in), by));
  std::memcpy(out + i, values, 4 * (n - i));
}

}  // namespace
}  // namespace wsync
