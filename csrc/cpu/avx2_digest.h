// The digest of four words at a time. Include only between the pragmas that switch AVX2 on.
#pragma once

#include <immintrin.h>

#include "core/digest.h"

namespace wsync {
namespace {

// Keys of four consecutive words, and the running sums of four lanes.
struct DigestLanes {
  __m256i key;
  __m256i sum;

  static inline __m256i key_of(uint64_t word) {
    const __m256i lanes = _mm256_set_epi64x(static_cast<int64_t>(3 * kDigestKey), static_cast<int64_t>(2 * kDigestKey),
                                            static_cast<int64_t>(kDigestKey), 0);
    return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(digest_key(word))), lanes);
  }

  // The key of the vector `vectors` further on.
  static inline __m256i step(uint64_t vectors) {
    return _mm256_set1_epi64x(static_cast<int64_t>(4 * vectors * kDigestKey));
  }

  static inline __m256i f(__m256i words, __m256i key) {
    const __m256i x = _mm256_xor_si256(words, key);
    return _mm256_add_epi64(_mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)), x);
  }

  static inline uint64_t total(__m256i sums) {
    const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return static_cast<uint64_t>(_mm_extract_epi64(halves, 0)) + static_cast<uint64_t>(_mm_extract_epi64(halves, 1));
  }
};

}  // namespace
}  // namespace wsync
