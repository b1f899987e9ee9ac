// Vectors of AVX2 under the names that the simd_*.h kernels use. Include only between the pragmas that switch AVX2 on.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/digest.h"

namespace wsync {
namespace {

// 32 bytes of integers or 8 floats. Lanes of 16 bits are numbered in memory order.
struct V {
  using I = __m256i;
  using F = __m256;
  using Mask16 = __m256i;
  static constexpr int kBytes = 32;
  static constexpr int kLanes16 = 16;
  static constexpr int kLanes32 = 8;

  static inline I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static inline void store(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static inline void stream(void* p, I v) { _mm256_stream_si256(static_cast<I*>(p), v); }
  static inline F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }

  static inline I zero() { return _mm256_setzero_si256(); }
  static inline I set16(uint32_t v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  static inline I set32(uint32_t v) { return _mm256_set1_epi32(static_cast<int32_t>(v)); }
  static inline I set64(uint64_t v) { return _mm256_set1_epi64x(static_cast<int64_t>(v)); }
  static inline F set_f(float v) { return _mm256_set1_ps(v); }
  static inline F as_f(I v) { return _mm256_castsi256_ps(v); }
  static inline I as_i(F v) { return _mm256_castps_si256(v); }

  static inline I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static inline I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static inline I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  static inline I andnot(I a, I b) { return _mm256_andnot_si256(a, b); }
  static inline I add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static inline I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static inline I add64(I a, I b) { return _mm256_add_epi64(a, b); }
  static inline I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static inline I mul_low32(I a, I b) { return _mm256_mul_epu32(a, b); }
  static inline I max_u16(I a, I b) { return _mm256_max_epu16(a, b); }
  static inline I max_u32(I a, I b) { return _mm256_max_epu32(a, b); }
  static inline I min_u16(I a, I b) { return _mm256_min_epu16(a, b); }
  static inline I min_u32(I a, I b) { return _mm256_min_epu32(a, b); }
  template <int kN>
  static inline I srl16(I v) {
    return _mm256_srli_epi16(v, kN);
  }
  template <int kN>
  static inline I sll16(I v) {
    return _mm256_slli_epi16(v, kN);
  }
  template <int kN>
  static inline I srl32(I v) {
    return _mm256_srli_epi32(v, kN);
  }
  template <int kN>
  static inline I sll32(I v) {
    return _mm256_slli_epi32(v, kN);
  }
  template <int kN>
  static inline I srl64(I v) {
    return _mm256_srli_epi64(v, kN);
  }

  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F to_f(I v) { return _mm256_cvtepi32_ps(v); }

  // Lanes are signed.
  static inline Mask16 gt16(I a, I b) { return _mm256_cmpgt_epi16(a, b); }
  static inline Mask16 both(Mask16 a, Mask16 b) { return _mm256_and_si256(a, b); }
  static inline bool any(Mask16 m) { return !_mm256_testz_si256(m, m); }
  static inline I select16(Mask16 m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
  // a + 1 where the mask is set, and a where it is not, else 0.
  static inline I increment16(I a, Mask16 m) { return _mm256_sub_epi16(a, m); }
  static inline I keep16(Mask16 m, I a) { return _mm256_and_si256(m, a); }
  // a where x < y, else b; lanes of 32 bits, signed.
  static inline I select_lt32(I x, I y, I a, I b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi32(y, x)); }

  // The upper halves of 32-bit lanes, with the last bit set where anything is in the lower half: rounding that to 7
  // bits or less gives what rounding the 32 bits would.
  static inline I sticky(I v) {
    const I low = set32(0xffff);
    return or_(v, add32(and_(v, low), low));
  }
  // Upper halves of the 32-bit lanes of a, then of b, as 16-bit lanes.
  static inline I high_halves(I a, I b) {
    const I packed = _mm256_packus_epi32(srl32<16>(a), srl32<16>(b));
    return _mm256_permute4x64_epi64(packed, 0xd8);
  }
  // Upper halves of the 32-bit lanes of `even` and `odd` taken in turn.
  static inline I interleave_high(I even, I odd) { return _mm256_blend_epi16(srl32<16>(even), odd, 0xaa); }
  // 32-bit lanes of the even (odd) 16-bit lanes, at their upper halves.
  static inline I even_high(I v) { return sll32<16>(v); }
  static inline I odd_high(I v) { return andnot(set32(0xffff), v); }

  // Each 16-bit lane's low byte plus 16 times its high byte.
  static inline I fold16(I v) { return _mm256_maddubs_epi16(v, set16(0x1001)); }
  // 16-bit lanes of at most 255 to bytes.
  static inline I bytes(I a, I b) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8); }
  // 32-bit lanes of at most 255 to bytes.
  static inline I bytes(I a, I b, I c, I d) {
    const I packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  // 16-bit lanes of at most 15 to half bytes, the first at the low end.
  static inline I nibbles(I a, I b, I c, I d) {
    const I low = fold16(_mm256_packus_epi16(a, b));
    const I high = fold16(_mm256_packus_epi16(c, d));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  // Bytes, and half bytes from the low end on, to 32-bit lanes.
  static inline I widen_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static inline I widen_nibbles(const uint8_t* p) {
    uint32_t packed;
    std::memcpy(&packed, p, 4);
    return and_(_mm256_srlv_epi32(set32(packed), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)), set32(15));
  }
  // The values of e2m1 codes.
  static inline F e2m1_values(I code) {
    const F magnitude = _mm256_permutevar8x32_ps(_mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f), code);
    return as_f(or_(as_i(magnitude), sll32<28>(and_(code, set32(8)))));
  }

  // The digest keys of consecutive 64-bit words, relative to the first.
  static inline I word_keys() {
    return _mm256_set_epi64x(static_cast<int64_t>(3 * kDigestKey), static_cast<int64_t>(2 * kDigestKey),
                             static_cast<int64_t>(kDigestKey), 0);
  }
  static inline uint64_t sum64(I v) {
    const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return static_cast<uint64_t>(_mm_extract_epi64(halves, 0)) + static_cast<uint64_t>(_mm_extract_epi64(halves, 1));
  }
  static inline __m256i fold_max_u16(I v) { return v; }
  static inline __m256i fold_max_u32(I v) { return v; }
};

}  // namespace
}  // namespace wsync
