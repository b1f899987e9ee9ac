// Rounds f32 to bf16, and f16 to bf16, along runs that are contiguous on both sides.
#pragma once

#include "cuda/move.cuh"

namespace wsync {
namespace cuda {

// A unit: vectors [x, x + n) of 16 bytes of bf16, that is of 8 values; x, n and every run are even. Lanes 2i and 2i + 1
// share 16 source values and store 8 each.
template <int kSrc>
__global__ void __launch_bounds__(kThreads, 3)
    round_kernel(const MoveRecord* records, const Unit* units, uint32_t num_units, uint8_t* base, Result* result) {
  constexpr int kUnroll = 2;
  const bool odd = threadIdx.x % 2 != 0;
  uint64_t sum = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const MoveRecord& m = records[unit.record];
    const uint8_t* src = move_src(m, base);
    uint8_t* dst = move_dst(m, base);
    const uint32_t end = unit.x + unit.n;
    for (uint32_t at = unit.x; at < end; at += kThreads * kUnroll) {
      typename Source<kSrc>::Half halves[kUnroll];
      Place places[kUnroll];
      uint32_t max2[kUnroll] = {0, 0};
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const uint32_t idx = at + static_cast<uint32_t>(k) * kThreads + threadIdx.x;
        places[k] = place_of(m, idx & ~1u, 8 * Source<kSrc>::kBytes, 16);
        halves[k] = Source<kSrc>::load(src + places[k].src, odd, idx < end, &max2[k]);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const uint32_t idx = at + static_cast<uint32_t>(k) * kThreads + threadIdx.x;
        if (idx >= end) continue;
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words.w[i] = cvt_bf16x2(Source<kSrc>::value(halves[k], 2 * i), Source<kSrc>::value(halves[k], 2 * i + 1));
        }
        store_global_16(dst + places[k].dst + (odd ? 16 : 0), words);
        sum += digest_vector(words.w, m.wire_word + 2 * static_cast<uint64_t>(idx));
        if (max2[k] >= Source<kSrc>::kNonfinite2) {
          report_run(m, src + places[k].src, Source<kSrc>::kBytes, static_cast<uint64_t>(idx & ~1u) * 8, 16, result);
        }
      }
    }
  }
  add_digest(sum, result);
}

}  // namespace cuda
}  // namespace wsync
