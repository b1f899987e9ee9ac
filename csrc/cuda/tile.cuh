// A tile: what the 256 threads of a block hold of a matrix in registers between the maximum and the codes, so that the
// source is read once. Thread for thread it is 8 halves of vectors, one for each step.
#pragma once

#include "cuda/source.cuh"

namespace wsync {
namespace cuda {

constexpr int kSteps = 8;

// Where the vector of this lane's pair lies at step 0, and what a step adds. Both lanes of a pair have the same.
struct Walk {
  const uint8_t* src;
  int64_t src_step;  // bytes
  int64_t offset;    // packed index of the vector's first element
  int64_t offset_step;
  int32_t at;  // the vector exists while at < limit
  int32_t at_step;
  int32_t limit;
};

template <int kSrc>
__device__ __forceinline__ uint32_t load_tile(const Walk& walk, typename Source<kSrc>::Half (&halves)[kSteps]) {
  const bool odd = threadIdx.x % 2 != 0;
  uint32_t max2 = 0;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const bool active = walk.at + j * walk.at_step < walk.limit;
    halves[j] = Source<kSrc>::load(walk.src + j * walk.src_step, odd, active, &max2);
  }
  return max2;
}

// 8 e4m3 codes of quotient(value).
template <int kSrc, typename Fn>
__device__ __forceinline__ void codes_of(const typename Source<kSrc>::Half& half, Fn quotient, uint32_t (&codes)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float q0 = quotient(Source<kSrc>::value(half, 4 * i));
    const float q1 = quotient(Source<kSrc>::value(half, 4 * i + 1));
    const float q2 = quotient(Source<kSrc>::value(half, 4 * i + 2));
    const float q3 = quotient(Source<kSrc>::value(half, 4 * i + 3));
    codes[i] = cvt_e4m3x2(q0, q1) | cvt_e4m3x2(q2, q3) << 16;
  }
}

// Writes the codes of a tile and returns the digest of what this thread wrote.
template <int kSrc, typename Fn>
__device__ __forceinline__ uint64_t store_tile(const Walk& walk, const typename Source<kSrc>::Half (&halves)[kSteps],
                                               uint8_t* dst, uint64_t wire_word, Fn quotient) {
  const bool odd = threadIdx.x % 2 != 0;
  uint64_t sum = 0;
#pragma unroll
  for (int j = 0; j < kSteps; j += 2) {
    uint32_t first[2], second[2];
    codes_of<kSrc>(halves[j], quotient, first);
    codes_of<kSrc>(halves[j + 1], quotient, second);
    Words4 codes;
    exchange_halves(first, second, odd, codes.w);
    const int step = odd ? j + 1 : j;
    if (walk.at + step * walk.at_step < walk.limit) {
      const int64_t offset = walk.offset + step * walk.offset_step;
      store_global_16(dst + offset, codes);
      sum += digest_vector(codes.w, wire_word + static_cast<uint64_t>(offset) / 8);
    }
  }
  return sum;
}

}  // namespace cuda
}  // namespace wsync
