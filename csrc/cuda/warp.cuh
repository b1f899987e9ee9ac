// What several kernels share: divisions, reductions over a warp and a block, exchanges between lanes, digests.
#pragma once

#include "core/digest.h"
#include "cuda/device.cuh"
#include "cuda/records.h"

namespace wsync {
namespace cuda {

__device__ __forceinline__ uint32_t lane_idx() { return threadIdx.x % kWarp; }
__device__ __forceinline__ uint32_t warp_idx() { return threadIdx.x / kWarp; }

__device__ __forceinline__ uint32_t divide(uint32_t n, const FastDiv& by) {
  return (mul_high(n, by.multiplier) + n) >> by.shift;
}

__device__ __forceinline__ uint32_t largest(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The maximum over the groups of `width` neighbouring lanes, in all of them.
__device__ __forceinline__ uint32_t max_over_lanes(uint32_t value, int width) {
#pragma unroll
  for (int step = 1; step < width; step *= 2) value = largest(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Even and odd lanes hold the first and the second half of two items, a and b. Afterwards the even lane holds all of
// a, and the odd lane all of b.
template <int kHalf>
__device__ __forceinline__ void exchange_halves(const uint32_t (&a)[kHalf], const uint32_t (&b)[kHalf], bool odd,
                                                uint32_t (&whole)[2 * kHalf]) {
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? a[i] : b[i], 1);
    whole[i] = odd ? other : a[i];
    whole[kHalf + i] = odd ? b[i] : other;
  }
}

// The digest of 16 bytes whose first word has the index `word`.
__device__ __forceinline__ uint64_t digest_vector(const uint32_t (&w)[4], uint64_t word) {
  const uint64_t key = digest_key(word);
  return digest_word(static_cast<uint64_t>(w[1]) << 32 | w[0], key) +
         digest_word(static_cast<uint64_t>(w[3]) << 32 | w[2], key + kDigestKey);
}

// Adds the block's digests to the result with one atomic. All threads of the block must call it, once.
__device__ __forceinline__ void add_digest(uint64_t sum, Result* result) {
  WSYNC_SHARED(unsigned long long, sums, kWarps);
  unsigned long long total = sum;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_down_sync(kAllLanes, total, step);
  if (lane_idx() == 0) sums[warp_idx()] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) total += sums[w];
    atomicAdd(&result->digest, total);
  }
}

}  // namespace cuda
}  // namespace wsync
