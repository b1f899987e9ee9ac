// Vectors of AVX-512 (F, BW, DQ, VL) under the names that the simd_*.h kernels use; simd_avx2.h says what they do.
// Include only between the pragmas that switch AVX-512 on.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/digest.h"

namespace wsync {
namespace {

// 64 bytes of integers or 16 floats.
struct V {
  using I = __m512i;
  using F = __m512;
  using Mask16 = __mmask32;
  static constexpr int kBytes = 64;
  static constexpr int kLanes16 = 32;
  static constexpr int kLanes32 = 16;

  static inline I load(const void* p) { return _mm512_loadu_si512(p); }
  static inline void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static inline void stream(void* p, I v) { _mm512_stream_si512(static_cast<I*>(p), v); }
  static inline F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }

  static inline I zero() { return _mm512_setzero_si512(); }
  static inline I set16(uint32_t v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  static inline I set32(uint32_t v) { return _mm512_set1_epi32(static_cast<int32_t>(v)); }
  static inline I set64(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
  static inline F set_f(float v) { return _mm512_set1_ps(v); }
  static inline F as_f(I v) { return _mm512_castsi512_ps(v); }
  static inline I as_i(F v) { return _mm512_castps_si512(v); }

  static inline I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static inline I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static inline I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  static inline I andnot(I a, I b) { return _mm512_andnot_si512(a, b); }
  static inline I add16(I a, I b) { return _mm512_add_epi16(a, b); }
  static inline I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline I add64(I a, I b) { return _mm512_add_epi64(a, b); }
  static inline I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static inline I mul_low32(I a, I b) { return _mm512_mul_epu32(a, b); }
  static inline I max_u16(I a, I b) { return _mm512_max_epu16(a, b); }
  static inline I max_u32(I a, I b) { return _mm512_max_epu32(a, b); }
  static inline I min_u16(I a, I b) { return _mm512_min_epu16(a, b); }
  static inline I min_u32(I a, I b) { return _mm512_min_epu32(a, b); }
  template <int kN>
  static inline I srl16(I v) {
    return _mm512_srli_epi16(v, kN);
  }
  template <int kN>
  static inline I sll16(I v) {
    return _mm512_slli_epi16(v, kN);
  }
  template <int kN>
  static inline I srl32(I v) {
    return _mm512_srli_epi32(v, kN);
  }
  template <int kN>
  static inline I sll32(I v) {
    return _mm512_slli_epi32(v, kN);
  }
  template <int kN>
  static inline I srl64(I v) {
    return _mm512_srli_epi64(v, kN);
  }

  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F to_f(I v) { return _mm512_cvtepi32_ps(v); }

  static inline Mask16 gt16(I a, I b) { return _mm512_cmpgt_epi16_mask(a, b); }
  static inline Mask16 both(Mask16 a, Mask16 b) { return a & b; }
  static inline bool any(Mask16 m) { return m != 0; }
  static inline I select16(Mask16 m, I yes, I no) { return _mm512_mask_blend_epi16(m, no, yes); }
  static inline I increment16(I a, Mask16 m) { return _mm512_mask_add_epi16(a, m, a, set16(1)); }
  static inline I keep16(Mask16 m, I a) { return _mm512_maskz_mov_epi16(m, a); }
  static inline I select_lt32(I x, I y, I a, I b) {
    return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(x, y), b, a);
  }

  static inline I sticky(I v) {
    const __mmask16 lost = _mm512_test_epi32_mask(v, set32(0xffff));
    return _mm512_mask_or_epi32(v, lost, v, set32(0x10000));
  }
  static inline I high_halves(I a, I b) { return _mm512_permutex2var_epi16(a, odd_words(), b); }
  static inline I interleave_high(I even, I odd) { return _mm512_mask_blend_epi16(0xaaaaaaaa, srl32<16>(even), odd); }
  static inline I even_high(I v) { return sll32<16>(v); }
  static inline I odd_high(I v) { return and_(set32(0xffff0000), v); }

  static inline I fold16(I v) { return _mm512_maddubs_epi16(v, set16(0x1001)); }
  static inline I bytes(I a, I b) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi16(a, b));
  }
  static inline I bytes(I a, I b, I c, I d) {
    return in_order32(_mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d)));
  }
  static inline I nibbles(I a, I b, I c, I d) {
    return in_order32(_mm512_packus_epi16(fold16(_mm512_packus_epi16(a, b)), fold16(_mm512_packus_epi16(c, d))));
  }

  static inline I widen_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline I widen_nibbles(const uint8_t* p) {
    uint64_t packed;
    std::memcpy(&packed, p, 8);
    const I words = _mm512_mask_blend_epi32(0xff00, set32(static_cast<uint32_t>(packed)),
                                            set32(static_cast<uint32_t>(packed >> 32)));
    const I shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return and_(_mm512_srlv_epi32(words, shifts), set32(15));
  }
  static inline F e2m1_values(I code) {
    return _mm512_permutexvar_ps(code, _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f,
                                                      -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f));
  }

  static inline I word_keys() {
    return _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), set64(kDigestKey));
  }
  // Not _mm512_reduce_add_epi64, which adds signed numbers that may overflow.
  static inline uint64_t sum64(I v) {
    const __m256i fours = _mm256_add_epi64(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i twos = _mm_add_epi64(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    return static_cast<uint64_t>(_mm_extract_epi64(twos, 0)) + static_cast<uint64_t>(_mm_extract_epi64(twos, 1));
  }
  static inline __m256i fold_max_u16(I v) {
    return _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }
  static inline __m256i fold_max_u32(I v) {
    return _mm256_max_epu32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }

 private:
  // The packs work within 128 bits and leave 4 dwords of each operand there.
  static inline I in_order32(I v) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
  }
  static inline I odd_words() {
    return _mm512_add_epi16(set16(1), _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                                       30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0));
  }
};

}  // namespace
}  // namespace wsync
