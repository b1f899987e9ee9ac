// Packs 128 x 128 blocks: fp8_block128, fp8_block128_f32, and either with the scales of a table.
#pragma once

#include "cuda/tile.cuh"

namespace wsync {
namespace cuda {

// The part of scale block `block` of one dimension that lies in a box of `extent`, which begins `phase` into block 0.
struct Span {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ Span block_span(uint32_t block, int32_t phase, int64_t extent) {
  const int64_t begin = static_cast<int64_t>(block) * kScaleBlock - phase;
  const int64_t end = begin + kScaleBlock;
  return {begin < 0 ? 0 : begin, end < extent ? end : extent};
}

// A warp's step covers 2 rows of 128 columns, and a warp 16 rows.
template <int kSrc>
__device__ __forceinline__ Walk block_walk(const PackDesc& d, const Span& rows, const Span& cols) {
  const uint32_t pair = lane_idx() / 2;
  const auto row = static_cast<int32_t>(warp_idx() * (2 * kSteps) + pair / 8);
  const auto col = static_cast<int32_t>(pair % 8 * kVectorElems);
  const int64_t row_stride = d.src_stride[2] * Source<kSrc>::kBytes;
  Walk walk;
  walk.src = reinterpret_cast<const uint8_t*>(d.src) + (rows.begin + row) * row_stride +
             (cols.begin + col) * Source<kSrc>::kBytes;
  walk.src_step = 2 * row_stride;
  walk.offset = (rows.begin + row) * d.extent[3] + cols.begin + col;
  walk.offset_step = 2 * d.extent[3];
  walk.at = row;
  walk.at_step = 2;
  walk.limit = cols.begin + col < cols.end ? static_cast<int32_t>(rows.end - rows.begin) : 0;
  return walk;
}

// The maximum over the block of threads. `cells` alternates between two halves from one call to the next, so that one
// barrier is enough: who writes a half again has passed the barrier of the call between.
__device__ __forceinline__ uint32_t max_over_block(uint32_t value, uint32_t* cells) {
  value = max_over_lanes(value, kWarp);
  if (lane_idx() == 0) cells[warp_idx()] = value;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value = largest(value, cells[w]);
  return value;
}

// A unit: scale block (y, x) of the record's box.
template <int kSrc>
__global__ void __launch_bounds__(kThreads, Source<kSrc>::kBytes == 4 ? 2 : 3)
    pack_block_kernel(const PackRecord* records, const Unit* units, uint32_t num_units, uint8_t* dst_base,
                      Result* result) {
  WSYNC_SHARED(uint32_t, cells, 2 * kWarps);
  uint64_t sum = 0;
  uint32_t turn = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x, turn ^= 1) {
    const Unit unit = units[u];
    const PackRecord& record = records[unit.record];
    const PackDesc& d = record.d;
    const Span rows = block_span(unit.y, d.row_phase, d.extent[2]);
    const Span cols = block_span(unit.x, d.col_phase, d.extent[3]);
    const Walk walk = block_walk<kSrc>(d, rows, cols);
    typename Source<kSrc>::Half halves[kSteps];
    const uint32_t max2 = max_over_block(load_tile<kSrc>(walk, halves), cells + turn * kWarps);
    if (max2 >= Source<kSrc>::kNonfinite2) {
      for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
        report_row(record, row, cols.begin, cols.end, result);
      }
    }
    float* table = reinterpret_cast<float*>(d.scales) + unit.y * d.scale_stride + unit.x;
    float scale;
    if (d.op == kOpFp8Scaled) {
      scale = load_global<float>(table);
    } else {
      const float amax = Source<kSrc>::amax(max2);
      scale = d.op == kOpFp8Block128 ? scale_pow2(amax) : scale_f32(amax);
      if (threadIdx.x == 0) store_global(table, scale);
    }
    const float reciprocal = div_rn(1.0f, scale);
    sum += store_tile<kSrc>(walk, halves, dst_base + d.dst_offset, d.wire_word,
                            [=](float x) { return mul_rn(x, reciprocal); });
  }
  add_digest(sum, result);
}

}  // namespace cuda
}  // namespace wsync
