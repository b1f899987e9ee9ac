// Packs whole rows with one f32 scale each: fp8_channel. A team of 1, 2, 4 or 8 warps has a row.
#pragma once

#include "cuda/codec.cuh"
#include "cuda/tile.cuh"

namespace wsync {
namespace cuda {

// Columns that one warp covers in a step.
constexpr int32_t kStepCols = kWarp / 2 * kVectorElems;

// The walk over columns [window * team * kSteps * kStepCols, ...) of this team's row. Neighbouring warps take
// neighbouring columns.
template <int kSrc>
__device__ __forceinline__ Walk channel_walk(const PackDesc& d, int64_t row, uint32_t team) {
  const int32_t col =
      static_cast<int32_t>(warp_idx() % team) * kStepCols + static_cast<int32_t>(lane_idx() / 2) * kVectorElems;
  Walk walk;
  walk.src = reinterpret_cast<const uint8_t*>(d.src) + (row * d.src_stride[2] + col) * Source<kSrc>::kBytes;
  walk.offset = row * d.extent[3] + col;
  walk.at = col;
  walk.at_step = static_cast<int32_t>(team) * kStepCols;
  walk.src_step = walk.at_step * Source<kSrc>::kBytes;
  walk.offset_step = walk.at_step;
  walk.limit = static_cast<int64_t>(row) < d.extent[2] ? static_cast<int32_t>(d.extent[3]) : 0;
  return walk;
}

__device__ __forceinline__ void advance(Walk* walk, int windows) {
  walk->src += windows * kSteps * walk->src_step;
  walk->offset += windows * kSteps * walk->offset_step;
  walk->at += windows * kSteps * walk->at_step;
}

// The maximum over the warps of this thread's team. `cells` alternates as for max_over_block.
__device__ __forceinline__ uint32_t max_over_team(uint32_t value, uint32_t team, uint32_t* cells) {
  value = max_over_lanes(value, kWarp);
  if (lane_idx() == 0) cells[warp_idx()] = value;
  __syncthreads();
  const uint32_t first = warp_idx() / team * team;
  for (uint32_t w = 0; w < team; ++w) value = largest(value, cells[first + w]);
  return value;
}

// A unit: kWarps / team rows from row x on. Rows longer than a window are loaded twice, the last window but once; the
// second time they come out of the second-level cache.
template <int kSrc>
__global__ void __launch_bounds__(kThreads, kSrc == kSrcF32Exact ? 1 : 2)
    pack_channel_kernel(const PackRecord* records, const Unit* units, uint32_t num_units, uint8_t* dst_base,
                        Result* result) {
  WSYNC_SHARED(uint32_t, cells, 2 * kWarps);
  uint64_t sum = 0;
  uint32_t turn = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x, turn ^= 1) {
    const Unit unit = units[u];
    const PackRecord& record = records[unit.record];
    const PackDesc& d = record.d;
    const uint32_t team = record.team;
    const uint32_t row = unit.x + warp_idx() / team;
    typename Source<kSrc>::Half halves[kSteps];
    Walk walk = channel_walk<kSrc>(d, row, team);
    uint32_t max2 = load_tile<kSrc>(walk, halves);
    int window = 0;
    while (static_cast<int64_t>(window + 1) * kSteps * walk.at_step < d.extent[3]) {
      advance(&walk, 1);
      ++window;
      max2 = largest(max2, load_tile<kSrc>(walk, halves));
    }
    max2 = max_over_team(max2, team, cells + turn * kWarps);
    const bool first = threadIdx.x % (team * kWarp) == 0 && static_cast<int64_t>(row) < d.extent[2];
    if (first && max2 >= Source<kSrc>::kNonfinite2) report_row(record, row, 0, d.extent[3], result);
    const float scale = scale_channel(Source<kSrc>::amax(max2));
    if (first) store_global(reinterpret_cast<float*>(d.scales) + row * d.scale_stride, scale);
    const Quotient quotient(scale);
    const auto divided = [&](float x) { return quotient.of(x); };
    uint8_t* dst = dst_base + d.dst_offset;
    for (;; --window) {
      sum += store_tile<kSrc>(walk, halves, dst, d.wire_word, divided);
      if (window == 0) break;
      advance(&walk, -1);
      load_tile<kSrc>(walk, halves);
    }
  }
  add_digest(sum, result);
}

}  // namespace cuda
}  // namespace wsync
