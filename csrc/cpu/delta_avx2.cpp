#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/delta.h"

// Only the functions of this file may use these sets: see kernels_avx2.cpp.
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")

#include "cpu/delta_stripe.h"

namespace wsync {
namespace {

struct Avx2Masks {
  static __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static uint64_t bits(__m256i v) { return static_cast<uint32_t>(_mm256_movemask_epi8(v)); }

  template <int kBytes>
  static void masks(const uint8_t* base, const uint8_t* fresh, int top, GroupMasks* found) {
    __m256i exponents[2];  // of 32 elements each, as bytes in order
    if constexpr (kBytes == 2) {
      uint64_t same = 0;
      for (int half = 0; half < 2; ++half) {
        const __m256i a = load32(base + 64 * half), b = load32(base + 64 * half + 32);
        const __m256i equal = _mm256_packs_epi16(_mm256_cmpeq_epi16(a, load32(fresh + 64 * half)),
                                                 _mm256_cmpeq_epi16(b, load32(fresh + 64 * half + 32)));
        same |= bits(_mm256_permute4x64_epi64(equal, 0xd8)) << (32 * half);
        // Without the sign, 8 bits are left: packing does not saturate.
        const __m256i shifted_a = _mm256_srli_epi16(_mm256_slli_epi16(a, 1), 8);
        const __m256i shifted_b = _mm256_srli_epi16(_mm256_slli_epi16(b, 1), 8);
        exponents[half] = _mm256_permute4x64_epi64(_mm256_packus_epi16(shifted_a, shifted_b), 0xd8);
      }
      found->changed = ~same;
    } else {
      const __m256i a = load32(base), b = load32(base + 32), low = _mm256_set1_epi8(15);
      found->changed =
          ~(bits(_mm256_cmpeq_epi8(a, load32(fresh))) | bits(_mm256_cmpeq_epi8(b, load32(fresh + 32))) << 32);
      exponents[0] = _mm256_and_si256(_mm256_srli_epi16(a, 3), low);
      exponents[1] = _mm256_and_si256(_mm256_srli_epi16(b, 3), low);
    }
    const int above = top - kGapClasses + 1;
    const __m256i add = _mm256_set1_epi8(static_cast<char>(above < 0 ? -above : 0));
    const __m256i subtract = _mm256_set1_epi8(static_cast<char>(above > 0 ? above : 0));
    const __m256i last = _mm256_set1_epi8(kGapClasses - 1);
    __m256i classes[2];
    for (int half = 0; half < 2; ++half) {
      classes[half] = _mm256_min_epu8(_mm256_subs_epu8(_mm256_adds_epu8(exponents[half], add), subtract), last);
    }
    found->plane[0] = plane<0>(classes);
    found->plane[1] = plane<1>(classes);
    found->plane[2] = plane<2>(classes);
  }

  // Bit kBit of each byte: a movemask takes the top ones.
  template <int kBit>
  static uint64_t plane(const __m256i* bytes) {
    return bits(_mm256_slli_epi16(bytes[0], 7 - kBit)) | bits(_mm256_slli_epi16(bytes[1], 7 - kBit)) << 32;
  }

  static void count(const GroupMasks& masks, uint32_t* counts) { count_members(masks, counts); }

  static uint64_t select(uint64_t mask, uint64_t rank) { return _pdep_u64(uint64_t{1} << rank, mask); }
};

}  // namespace

const DeltaKernels& avx2_delta_kernels() {
  static const DeltaKernels kernels{&encode_stripe<Avx2Masks>, &apply_stripe<Avx2Masks>};
  return kernels;
}

}  // namespace wsync

#pragma GCC pop_options

#endif
