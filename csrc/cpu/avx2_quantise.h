// Pass 2 of quantising: 32 values of a tile become 32 bytes of e4m3. Include only between the pragmas that switch AVX2
// on.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "core/descriptors.h"
#include "core/digest.h"
#include "core/dtype.h"
#include "cpu/avx2_digest.h"
#include "cpu/kernels.h"

namespace wsync {
namespace {

// e4m3 of 16-bit floats (bf16, or f32 cut to 16 bits with a sticky last bit) divided by a power of two. e4m3 keeps 3 of
// the 7 mantissa bits, so subtracting the exponent and dropping 4 bits with RNE is the whole conversion, but for
// results below 2^-6 (about 1 in 10,000 weights).
class CodeMaker {
 public:
  // `exponent`: the exponent bits of the power of two.
  explicit CodeMaker(uint32_t exponent) {
    offset_ = _mm256_set1_epi16(static_cast<int16_t>(7 - ((static_cast<int>(exponent) - 7) << 7)));
    least_ = _mm256_set1_epi16(static_cast<int16_t>((exponent - 6) << 7));
    for (int k = 1; k <= 8; ++k) {
      // Halfway between k - 1 and k steps of 2^-9; a tie goes to the even one, so for even k the halfway point counts.
      const uint32_t halfway = bits_of((static_cast<float>(k) - 0.5f) * 0x1p-9f) + ((exponent - 127u) << 23);
      step_at_[k - 1] = static_cast<uint16_t>((halfway >> 16) - (k % 2 == 0 ? 1u : 0u));
    }
  }

  // 32 codes of x0 and x1, 16 values each.
  inline __m256i operator()(__m256i x0, __m256i x1) const {
    const __m256i one = _mm256_set1_epi16(1);
    auto round = [&](__m256i x) {
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(x, 4), one);
      return _mm256_srli_epi16(_mm256_add_epi16(_mm256_add_epi16(x, offset_), odd), 4);
    };
    __m256i q0 = round(x0);
    __m256i q1 = round(x1);
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    const __m256i a0 = _mm256_and_si256(x0, magnitude);
    const __m256i a1 = _mm256_and_si256(x1, magnitude);
    const __m256i small = _mm256_cmpgt_epi16(least_, _mm256_min_epi16(a0, a1));
    if (__builtin_expect(!_mm256_testz_si256(small, small), 0)) {
      q0 = patch_subnormals(x0, a0, q0);
      q1 = patch_subnormals(x1, a1, q1);
    }
    // Low byte + 16 * high byte brings the sign from bit 11 to bit 7.
    const __m256i fold = _mm256_set1_epi16(0x1001);
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_maddubs_epi16(q0, fold), _mm256_maddubs_epi16(q1, fold)),
                                    0xd8);
  }

 private:
  // 16 results as 16-bit words, sign at bit 11; `normal` is good where the magnitude is at least least_.
  __attribute__((noinline, cold)) __m256i patch_subnormals(__m256i x, __m256i magnitude, __m256i normal) const {
    __m256i code = _mm256_setzero_si256();
    for (const uint16_t step : step_at_) {
      code = _mm256_sub_epi16(code, _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(static_cast<int16_t>(step))));
    }
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(x, 15), 11);
    return _mm256_blendv_epi8(normal, _mm256_or_si256(code, sign), _mm256_cmpgt_epi16(least_, magnitude));
  }

  __m256i offset_;       // half of what is dropped, less the exponent at its place in 16 bits
  __m256i least_;        // smallest magnitude with a normal result
  uint16_t step_at_[8];  // a subnormal result is the number of these that the magnitude exceeds
};

inline __m256i load_si256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// bf16 times a power of two: exact, so that the bits go straight to the codec.
struct Pow2Quantiser {
  using Tile = uint16_t;
  CodeMaker codes;

  explicit Pow2Quantiser(float scale) : codes(bits_of(scale) >> 23) {}

  inline __m256i operator()(const uint16_t* tile) const { return codes(load_si256(tile), load_si256(tile + 16)); }
};

// bf16 times any f32. The product is cut to 16 bits whose last bit says whether anything was lost: rounding that to
// 3 mantissa bits gives what rounding the product would.
struct Bf16Quantiser {
  using Tile = uint16_t;
  CodeMaker codes;
  __m256 inv;

  explicit Bf16Quantiser(float scale) : codes(127), inv(_mm256_set1_ps(1.0f / scale)) {}

  inline __m256i scaled(__m256i x) const {
    const __m256i low = _mm256_set1_epi32(0xffff);
    auto product = [&](__m256i bits) {
      const __m256i v = _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(bits), inv));
      return _mm256_or_si256(v, _mm256_add_epi32(_mm256_and_si256(v, low), low));
    };
    const __m256i even = product(_mm256_slli_epi32(x, 16));
    const __m256i odd = product(_mm256_andnot_si256(low, x));
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  }

  inline __m256i operator()(const uint16_t* tile) const {
    return codes(scaled(load_si256(tile)), scaled(load_si256(tile + 16)));
  }
};

// f32 as given times any f32. Saturates, and so serves the rare tiles that the others do not.
struct F32Quantiser {
  using Tile = float;
  __m256 inv;

  explicit F32Quantiser(float scale) : inv(_mm256_set1_ps(1.0f / scale)) {}

  inline __m256i eight(const float* tile) const {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(tile), inv);
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i a =
        _mm256_min_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x43e00000));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(a, 20), _mm256_set1_epi32(1));
    const __m256i half = _mm256_set1_epi32(0x7ffff);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(a, half), odd), 20);
    const __m256i normal = _mm256_sub_epi32(rounded, _mm256_set1_epi32(960));
    // Below 2^-6 the step is 2^-9 = ulp(2^14): adding 2^14 rounds there.
    const __m256i shifted = _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_set1_ps(16384.0f)));
    const __m256i subnormal = _mm256_sub_epi32(shifted, _mm256_set1_epi32(0x46800000));
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), a);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    return _mm256_or_si256(_mm256_blendv_epi8(normal, subnormal, small), sign);
  }

  inline __m256i operator()(const float* tile) const {
    const __m256i q0 = _mm256_packus_epi32(eight(tile), eight(tile + 8));
    const __m256i q1 = _mm256_packus_epi32(eight(tile + 16), eight(tile + 24));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(q0, q1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
};

// The last 1 to 31 values of a row of a block, through padded buffers.
template <typename Quantiser>
uint64_t quantise_rest(const Quantiser& quantiser, const typename Quantiser::Tile* tile, int n, uint8_t* dst,
                       uint64_t word, bool counted) {
  typename Quantiser::Tile in[32] = {};
  alignas(32) uint8_t out[32];
  std::memcpy(in, tile, sizeof(in[0]) * static_cast<size_t>(n));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), quantiser(in));
  std::memcpy(dst, out, static_cast<size_t>(n));
  uint64_t sum = 0;
  for (int i = 0; counted && i < n; i += 8, ++word) {
    uint64_t value;
    std::memcpy(&value, out + i, 8);
    sum += digest_word(value, digest_key(word));
  }
  return sum;
}

template <bool kStream>
inline void store_codes(uint8_t* dst, __m256i codes) {
  if constexpr (kStream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), codes);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), codes);
  }
}

// One row whose blocks are all 128 wide: no rests, and the keys run on from block to block.
template <typename Quantiser, bool kStream>
inline __m256i quantise_whole_row(const typename Quantiser::Tile* tile, int num_blocks, const Quantiser* quantisers,
                                  uint8_t* dst, uint64_t word, const uint8_t* ahead, int ahead_block_bytes,
                                  __m256i sums) {
  const __m256i step = DigestLanes::step(1);
  __m256i key = DigestLanes::key_of(word);
  for (int b = 0; b < num_blocks; ++b, tile += kScaleBlock, dst += kScaleBlock) {
    const Quantiser& quantiser = quantisers[b];
    for (int i = 0; i < ahead_block_bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
    ahead += ahead_block_bytes;
#pragma GCC unroll 4
    for (int c = 0; c < kScaleBlock; c += 32) {
      const __m256i q = quantiser(tile + c);
      store_codes<kStream>(dst + c, q);
      sums = _mm256_add_epi64(sums, DigestLanes::f(q, key));
      key = _mm256_add_epi64(key, step);
    }
  }
  return sums;
}

template <typename Quantiser, bool kStream>
uint64_t quantise_rows(const typename Quantiser::Tile* tile, int rows, const TileCols& cols,
                       const Quantiser* quantisers, const TileSink& sink) {
  const int num_blocks = cols.num_blocks;
  const bool whole = cols.cols() == num_blocks * kScaleBlock;
  const __m256i step = DigestLanes::step(1);
  __m256i sums = _mm256_setzero_si256();
  uint64_t sum = 0;
  uint8_t* dst = sink.dst;
  uint64_t row_word = sink.first_word;
  for (int r = 0; r < rows; ++r, tile += kTileCols, dst += sink.dst_stride, row_word += sink.words_per_row) {
    if (whole) {
      sums = quantise_whole_row<Quantiser, kStream>(tile, num_blocks, quantisers, dst, row_word,
                                                    sink.ahead + r * sink.ahead_stride, sink.ahead_block_bytes, sums);
      continue;
    }
    for (int b = 0; b < num_blocks; ++b) {
      const Quantiser& quantiser = quantisers[b];
      int c = cols.begin[b];
      __m256i key = DigestLanes::key_of(row_word + static_cast<uint64_t>(c) / 8);
      for (; c + 32 <= cols.begin[b + 1]; c += 32) {
        const __m256i q = quantiser(tile + c);
        store_codes<kStream>(dst + c, q);
        sums = _mm256_add_epi64(sums, DigestLanes::f(q, key));
        key = _mm256_add_epi64(key, step);
      }
      if (const int rest = cols.begin[b + 1] - c; rest > 0) {
        sum += quantise_rest(quantiser, tile + c, rest, dst + c, row_word + static_cast<uint64_t>(c) / 8, sink.counted);
      }
    }
  }
  return sink.counted ? sum + DigestLanes::total(sums) : 0;
}

template <typename Quantiser>
uint64_t quantise_tile(const typename Quantiser::Tile* tile, int rows, const TileCols& cols, const float* scale,
                       const TileSink& sink) {
  alignas(32) uint8_t storage[kTileBlocks * sizeof(Quantiser)];
  auto* quantisers = reinterpret_cast<Quantiser*>(storage);
  // Non-temporal stores pay off where they fill whole cache lines.
  bool whole_lines = (reinterpret_cast<uintptr_t>(sink.dst) & 63u) == 0 && sink.dst_stride % 64 == 0;
  for (int b = 0; b < cols.num_blocks; ++b) {
    new (quantisers + b) Quantiser(scale[b]);
    whole_lines = whole_lines && cols.begin[b] % 64 == 0;
  }
  return whole_lines ? quantise_rows<Quantiser, true>(tile, rows, cols, quantisers, sink)
                     : quantise_rows<Quantiser, false>(tile, rows, cols, quantisers, sink);
}

}  // namespace
}  // namespace wsync
