// Maxima of parts of scale blocks, and the scales that come of them after the exchange.
#pragma once

#include "cuda/pack_block.cuh"

namespace wsync {
namespace cuda {

constexpr int kAmaxUnroll = 4;

__device__ __forceinline__ bool in_grid(int32_t recipe_op) {
  return recipe_op == kOpFp8Block128 || recipe_op == kOpFp8Block128F32;
}

// Rectangle `idx` of one dimension: a scale block, or `size` rows or columns.
__device__ __forceinline__ Span rect_span(uint32_t idx, int32_t size, int32_t phase, int64_t extent) {
  const int64_t begin = static_cast<int64_t>(idx) * size - phase;
  const int64_t end = begin + size;
  return {begin < 0 ? 0 : begin, end < extent ? end : extent};
}

__device__ __forceinline__ int64_t cell_index(const AmaxDesc& d, uint32_t row, uint32_t col) {
  if (in_grid(d.recipe_op)) return static_cast<int64_t>(row) * d.amax_stride + col;
  return d.recipe_op == kOpFp8Channel ? static_cast<int64_t>(row) * d.amax_stride : 0;
}

// Bits shifted left by one, as in source.cuh, from which on a value is not finite; and the amax that they stand for.
__device__ __forceinline__ uint32_t nonfinite2_of(int32_t src_dtype) {
  if (src_dtype == kSrcF16) return Source<kSrcF16>::kNonfinite2;
  return src_dtype == kSrcF32 ? Source<kSrcF32>::kNonfinite2 : Source<kSrcF32Exact>::kNonfinite2;
}

__device__ __forceinline__ float amax_of(int32_t src_dtype, uint32_t max2) {
  if (src_dtype == kSrcBf16) return Source<kSrcBf16>::amax(max2);
  if (src_dtype == kSrcF16) return Source<kSrcF16>::amax(max2);
  return src_dtype == kSrcF32 ? Source<kSrcF32>::amax(max2) : Source<kSrcF32Exact>::amax(max2);
}

__device__ __forceinline__ const uint8_t* amax_address(const AmaxDesc& d, int64_t row, int64_t col) {
  return reinterpret_cast<const uint8_t*>(d.src) +
         (row * d.src_stride[0] + col * d.src_stride[1]) * source_elem_bytes(d.src_dtype);
}

// The maximum of this thread's 16-byte vectors of the rectangle.
template <int kBytes>
__device__ __forceinline__ uint32_t max_of_vectors(const AmaxDesc& d, const Span& rows, const Span& cols) {
  constexpr int64_t kElems = 16 / kBytes;
  const uint8_t* src = amax_address(d, rows.begin, cols.begin);
  const int64_t row_stride = d.src_stride[0] * kBytes;
  const auto per_row = static_cast<uint32_t>((cols.end - cols.begin) / kElems);
  const uint32_t total = per_row * static_cast<uint32_t>(rows.end - rows.begin);
  uint32_t max2 = 0;
  for (uint32_t first = threadIdx.x; first < total; first += kThreads * kAmaxUnroll) {
    Words4 words[kAmaxUnroll];
#pragma unroll
    for (int k = 0; k < kAmaxUnroll; ++k) {
      const uint32_t idx = first + static_cast<uint32_t>(k) * kThreads;
      words[k] = {{0, 0, 0, 0}};
      if (idx >= total) continue;
      const uint32_t row = idx / per_row;
      words[k] = load_global_16(src + row * row_stride + static_cast<int64_t>(idx - row * per_row) * 16);
    }
#pragma unroll
    for (int k = 0; k < kAmaxUnroll; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        raise(&max2, words[k].w[i] << 1);
        if (kBytes == 2) raise(&max2, words[k].w[i] << 17);
      }
    }
  }
  return max2;
}

// The same, element by element.
__device__ __forceinline__ uint32_t max_of_elements(const AmaxDesc& d, const Span& rows, const Span& cols) {
  const int64_t width = cols.end - cols.begin;
  const int64_t total = width * (rows.end - rows.begin);
  uint32_t max2 = 0;
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    const uint8_t* at = amax_address(d, rows.begin + i / width, cols.begin + i % width);
    const bool half = source_elem_bytes(d.src_dtype) == 2;
    raise(&max2, half ? static_cast<uint32_t>(load_global<uint16_t>(at)) << 17 : load_global<uint32_t>(at) << 1);
  }
  return max2;
}

__device__ __forceinline__ void report_rectangle(const AmaxRecord& record, const Span& rows, const Span& cols,
                                                 Result* result) {
  const AmaxDesc& d = record.d;
  const int64_t width = cols.end - cols.begin;
  const int64_t total = width * (rows.end - rows.begin);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    const int64_t row = rows.begin + i / width;
    const int64_t col = cols.begin + i % width;
    if (!element_nonfinite(amax_address(d, row, col), d.src_dtype)) continue;
    atomicMin(&result->bad, bad_key(record.desc_idx, static_cast<uint64_t>(row * d.extent[1] + col)));
    return;
  }
}

// A unit: rectangle (y, x) of the record's box. kBytes is that of the elements of 16-byte vectors, or 0 for single
// elements of any dtype.
template <int kBytes>
__global__ void __launch_bounds__(kThreads, 4)
    amax_kernel(const AmaxRecord* records, const Unit* units, uint32_t num_units, uint8_t*, Result* result) {
  WSYNC_SHARED(uint32_t, cells, 2 * kWarps);
  uint32_t turn = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x, turn ^= 1) {
    const Unit unit = units[u];
    const AmaxRecord& record = records[unit.record];
    const AmaxDesc& d = record.d;
    const bool grid = in_grid(d.recipe_op);
    const Span rows = rect_span(unit.y, record.rect_rows, grid ? d.row_phase : 0, d.extent[0]);
    const Span cols = rect_span(unit.x, record.rect_cols, grid ? d.col_phase : 0, d.extent[1]);
    uint32_t max2;
    if constexpr (kBytes == 0) {
      max2 = max_of_elements(d, rows, cols);
    } else {
      max2 = max_of_vectors<kBytes>(d, rows, cols);
    }
    max2 = max_over_block(max2, cells + turn * kWarps);
    if (max2 >= nonfinite2_of(d.src_dtype)) report_rectangle(record, rows, cols, result);
    if (threadIdx.x == 0) {
      auto* cell = reinterpret_cast<uint32_t*>(d.amax) + cell_index(d, unit.y, unit.x);
      atomicMax(cell, bits_of(amax_of(d.src_dtype, max2)));
    }
  }
}

__device__ __forceinline__ float scale_of_amax(int32_t recipe_op, float amax) {
  switch (recipe_op) {
    case kOpFp8Block128:
      return scale_pow2(amax);
    case kOpFp8Block128F32:
      return scale_f32(amax);
    case kOpFp8Channel:
      return scale_channel(amax);
    case kOpFp8Tensor:
      return scale_tensor(amax);
    default:
      return scale2_nvfp4(amax);
  }
}

// A unit: cells [x, x + n) of the record in row-major order.
__global__ void __launch_bounds__(kThreads)
    scales_kernel(const AmaxRecord* records, const Unit* units, uint32_t num_units, uint8_t*, Result*) {
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const AmaxRecord& record = records[unit.record];
    const AmaxDesc& d = record.d;
    for (uint32_t i = unit.x + threadIdx.x; i < unit.x + unit.n; i += kThreads) {
      const auto row = static_cast<int64_t>(i / record.cells_per_row);
      const auto col = static_cast<int64_t>(i % record.cells_per_row);
      const float amax = load_global<float>(reinterpret_cast<const float*>(d.amax) + row * d.amax_stride + col);
      store_global(reinterpret_cast<float*>(d.scales) + row * d.scale_stride + col, scale_of_amax(d.recipe_op, amax));
    }
  }
}

}  // namespace cuda
}  // namespace wsync
