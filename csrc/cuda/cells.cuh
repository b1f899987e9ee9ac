// Scales of matrices without 16-byte vectors, written to the table before pack_words_kernel reads it.
#pragma once

#include "cuda/pack_block.cuh"

namespace wsync {
namespace cuda {

// The part of a matrix that shares a scale.
struct Cell {
  Span rows;
  Span cols;
};

__device__ __forceinline__ Cell cell_of(const PackDesc& d, uint32_t row, uint32_t col) {
  const Span line = {static_cast<int64_t>(row), static_cast<int64_t>(row) + 1};
  const auto at = static_cast<int64_t>(col);
  if (d.op == kOpMxfp8) return {line, {at * kMxGroup, at * kMxGroup + kMxGroup}};
  if (d.op == kOpNvfp4) return {line, {at * kNvGroup, at * kNvGroup + kNvGroup}};
  if (d.op == kOpFp8Channel) return {line, {0, d.extent[3]}};
  return {block_span(row, d.row_phase, d.extent[2]), block_span(col, d.col_phase, d.extent[3])};
}

__device__ __forceinline__ void store_cell_scale(const PackDesc& d, int64_t at, float amax) {
  auto* scales = reinterpret_cast<float*>(d.scales);
  auto* bytes = reinterpret_cast<uint8_t*>(d.scales);
  switch (d.op) {
    case kOpFp8Block128:
      return store_global(scales + at, scale_pow2(amax));
    case kOpFp8Block128F32:
      return store_global(scales + at, scale_f32(amax));
    case kOpFp8Channel:
      return store_global(scales + at, scale_channel(amax));
    case kOpMxfp8:
      return store_global(bytes + at, scale_mxfp8(amax));
    default: {
      const float scale2 = scale2_nvfp4(load_global<float>(reinterpret_cast<const void*>(d.amax)));
      return store_global(bytes + at, scale_nvfp4(amax, scale2));
    }
  }
}

// A unit: scales [x, x + n) of the record's table in row-major order, one for each warp at a time. Values that are not
// finite are left for pack_words_kernel to report.
__global__ void __launch_bounds__(kThreads, 4)
    cell_scales_kernel(const PackRecord* records, const Unit* units, uint32_t num_units, uint8_t*, Result*) {
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const PackRecord& record = records[unit.record];
    const PackDesc& d = record.d;
    for (uint32_t i = unit.x + warp_idx(); i < unit.x + unit.n; i += kWarps) {
      const uint32_t row = i / record.cells_per_row;
      const uint32_t col = i % record.cells_per_row;
      const Cell cell = cell_of(d, row, col);
      uint32_t max_bits = 0;
      for (int64_t r = cell.rows.begin; r < cell.rows.end; ++r) {
        for (int64_t c = cell.cols.begin + lane_idx(); c < cell.cols.end; c += kWarp) {
          max_bits = largest(max_bits, bits_of(element_value(element_address(d, r, c), d.src_dtype)) & 0x7fffffffu);
        }
      }
      max_bits = max_over_lanes(max_bits, kWarp);
      if (lane_idx() == 0) store_cell_scale(d, row * d.scale_stride + col, f32_of(max_bits));
    }
  }
}

}  // namespace cuda
}  // namespace wsync
