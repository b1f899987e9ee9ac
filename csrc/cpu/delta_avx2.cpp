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
  static void masks(const uint8_t* base, const uint8_t* fresh, const int16_t* limits, GroupMasks* found) {
    found->from[0] = ~uint64_t{0};
    found->from[kGapClasses] = 0;
    if constexpr (kBytes == 2) {
      words(base, fresh, limits, found);
    } else {
      bytes(base, fresh, limits, found);
    }
  }

  static void words(const uint8_t* base, const uint8_t* fresh, const int16_t* limits, GroupMasks* found) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i low[2], high[2];
    uint64_t same = 0;
    for (int half = 0; half < 2; ++half) {
      const __m256i a = load32(base + 64 * half), b = load32(base + 64 * half + 32);
      const __m256i equal = _mm256_packs_epi16(_mm256_cmpeq_epi16(a, load32(fresh + 64 * half)),
                                               _mm256_cmpeq_epi16(b, load32(fresh + 64 * half + 32)));
      same |= bits(_mm256_permute4x64_epi64(equal, 0xd8)) << (32 * half);
      // Packing works on halves of registers: swapped before it, what comes out is in order.
      low[half] = _mm256_and_si256(_mm256_permute2x128_si256(a, b, 0x20), magnitude);
      high[half] = _mm256_and_si256(_mm256_permute2x128_si256(a, b, 0x31), magnitude);
    }
    found->changed = ~same;
    for (int j = 0; j < kGapClasses - 1; ++j) {
      const __m256i limit = _mm256_set1_epi16(limits[j]);
      uint64_t mask = 0;
      for (int half = 0; half < 2; ++half) {
        mask |= bits(_mm256_packs_epi16(_mm256_cmpgt_epi16(low[half], limit), _mm256_cmpgt_epi16(high[half], limit)))
                << (32 * half);
      }
      found->from[j + 1] = mask;
    }
  }

  static void bytes(const uint8_t* base, const uint8_t* fresh, const int16_t* limits, GroupMasks* found) {
    const __m256i a = load32(base), b = load32(base + 32);
    found->changed =
        ~(bits(_mm256_cmpeq_epi8(a, load32(fresh))) | bits(_mm256_cmpeq_epi8(b, load32(fresh + 32))) << 32);
    const __m256i magnitude = _mm256_set1_epi8(0x7f);
    const __m256i low = _mm256_and_si256(a, magnitude), high = _mm256_and_si256(b, magnitude);
    for (int j = 0; j < kGapClasses - 1; ++j) {
      const __m256i limit = _mm256_set1_epi8(static_cast<char>(limits[j] > 127 ? 127 : limits[j]));
      found->from[j + 1] = bits(_mm256_cmpgt_epi8(low, limit)) | bits(_mm256_cmpgt_epi8(high, limit)) << 32;
    }
  }

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
