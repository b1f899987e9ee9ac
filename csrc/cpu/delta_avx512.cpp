#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/delta.h"

// Only the functions of this file may use these sets: see kernels_avx2.cpp.
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq")

#include "cpu/delta_stripe.h"

namespace wsync {
namespace {

struct Avx512Masks {
  static __m512i load64(const uint8_t* p) { return _mm512_loadu_si512(p); }

  template <int kBytes>
  static void masks(const uint8_t* base, const uint8_t* fresh, int top, GroupMasks* found) {
    __m512i exponents;  // of 64 elements, as bytes in order
    if constexpr (kBytes == 2) {
      const __m512i a = load64(base), b = load64(base + 64);
      const uint64_t low = _mm512_cmpneq_epi16_mask(a, load64(fresh));
      const uint64_t high = _mm512_cmpneq_epi16_mask(b, load64(fresh + 64));
      found->changed = low | high << 32;
      const auto of = [](__m512i v) { return _mm512_cvtepi16_epi8(_mm512_srli_epi16(_mm512_slli_epi16(v, 1), 8)); };
      exponents = _mm512_inserti64x4(_mm512_castsi256_si512(of(a)), of(b), 1);
    } else {
      const __m512i a = load64(base);
      found->changed = _mm512_cmpneq_epi8_mask(a, load64(fresh));
      exponents = _mm512_and_si512(_mm512_srli_epi16(a, 3), _mm512_set1_epi8(15));
    }
    const int above = top - kGapClasses + 1;
    const __m512i add = _mm512_set1_epi8(static_cast<char>(above < 0 ? -above : 0));
    const __m512i subtract = _mm512_set1_epi8(static_cast<char>(above > 0 ? above : 0));
    const __m512i classes = _mm512_min_epu8(_mm512_subs_epu8(_mm512_adds_epu8(exponents, add), subtract),
                                            _mm512_set1_epi8(kGapClasses - 1));
    for (int b = 0; b < 3; ++b) found->plane[b] = _mm512_test_epi8_mask(classes, _mm512_set1_epi8(1 << b));
  }

  // All classes at once: lane c holds the members of class c.
  static void count(const GroupMasks& masks, uint32_t* counts) {
    const __m512i flip0 = _mm512_set_epi64(0, -1, 0, -1, 0, -1, 0, -1);
    const __m512i flip1 = _mm512_set_epi64(0, 0, -1, -1, 0, 0, -1, -1);
    const __m512i flip2 = _mm512_set_epi64(0, 0, 0, 0, -1, -1, -1, -1);
    const auto plane = [&](int b, __m512i flip) {
      return _mm512_xor_si512(_mm512_set1_epi64(static_cast<int64_t>(masks.plane[b])), flip);
    };
    const __m512i members = _mm512_and_si512(_mm512_and_si512(plane(0, flip0), plane(1, flip1)), plane(2, flip2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts), _mm512_cvtepi64_epi32(_mm512_popcnt_epi64(members)));
  }

  static uint64_t select(uint64_t mask, uint64_t rank) { return _pdep_u64(uint64_t{1} << rank, mask); }
};

}  // namespace

const DeltaKernels& avx512_delta_kernels() {
  static const DeltaKernels kernels{&encode_stripe<Avx512Masks>, &apply_stripe<Avx512Masks>};
  return kernels;
}

}  // namespace wsync

#pragma GCC pop_options

#endif
