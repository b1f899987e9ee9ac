// 128 x 128 blocks from any scales to power-of-two scales, as vLLM does when it loads. May work in place: a block's
// codes and scale are read before the barrier and written after it.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/pack_block.cuh"

namespace wsync {
namespace cuda {

constexpr int kRequantSteps = 4;

__device__ __forceinline__ void report_block(const TransformRecord& record, const Span& rows, const Span& cols,
                                             float scale, Result* result) {
  const TransformDesc& d = record.d;
  const int64_t width = cols.end - cols.begin;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < width * (rows.end - rows.begin); i += kThreads) {
    const int64_t row = rows.begin + i / width;
    const int64_t col = cols.begin + i % width;
    const auto* code = reinterpret_cast<const uint8_t*>(d.codes) + row * d.code_stride + col;
    const float value = mul_rn(f32_of_e4m3(load_global<uint8_t>(code)), scale);
    if ((bits_of(value) & 0x7fffffffu) < kF32Infinity) continue;
    atomicMin(&result->bad, bad_key(record.desc_idx, static_cast<uint64_t>(row * d.extent[1] + col)));
    return;
  }
}

// 4 codes of code * scale * reciprocal, both products rounded.
__device__ __forceinline__ uint32_t requantised(uint32_t codes, float scale, float reciprocal) {
  float v[4];
  cvt_f32x2_e4m3(static_cast<uint16_t>(codes), &v[0], &v[1]);
  cvt_f32x2_e4m3(static_cast<uint16_t>(codes >> 16), &v[2], &v[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = mul_rn(mul_rn(v[i], scale), reciprocal);
  return cvt_e4m3x2(v[0], v[1]) | cvt_e4m3x2(v[2], v[3]) << 16;
}

// The largest of 4 codes without their signs.
__device__ __forceinline__ uint32_t largest_code(uint32_t codes) {
  const uint32_t even = codes & 0x007f007fu;
  const uint32_t odd = codes >> 8 & 0x007f007fu;
  return largest(largest(even & 0xffffu, even >> 16), largest(odd & 0xffffu, odd >> 16));
}

// What all threads of the block do once they know the largest code: the scale is written, the rest is up to them.
struct NewScale {
  float old_scale;
  float reciprocal;
  bool finite;
};

// A code's value grows with the code, so the amax of the values is the value of the largest code.
__device__ __forceinline__ NewScale new_scale(const TransformDesc& d, const Unit& unit, float old_scale,
                                              uint32_t max_code) {
  const float amax = abs_f32(mul_rn(f32_of_e4m3(static_cast<uint8_t>(max_code)), old_scale));
  const float scale = scale_pow2(amax);
  if (threadIdx.x == 0) {
    store_global(reinterpret_cast<float*>(d.dst_scales) + unit.y * d.dst_scale_stride + unit.x, scale);
  }
  return {old_scale, div_rn(1.0f, scale), bits_of(amax) < kF32Infinity};
}

// A unit: block (y, x). Codes and destination in 16-byte vectors.
__global__ void __launch_bounds__(kThreads, 4)
    requantise_kernel(const TransformRecord* records, const Unit* units, uint32_t num_units, uint8_t*, Result* result) {
  WSYNC_SHARED(uint32_t, cells, 2 * kWarps);
  uint32_t turn = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x, turn ^= 1) {
    const Unit unit = units[u];
    const TransformRecord& record = records[unit.record];
    const TransformDesc& d = record.d;
    const Span rows = block_span(unit.y, 0, d.extent[0]);
    const Span cols = block_span(unit.x, 0, d.extent[1]);
    const int64_t row = rows.begin + threadIdx.x / 8;
    const int64_t col = cols.begin + threadIdx.x % 8 * 16;
    const float old_scale = code_scale(d, rows.begin, cols.begin);
    Words4 codes[kRequantSteps];
    uint32_t max_code = 0;
#pragma unroll
    for (int j = 0; j < kRequantSteps; ++j) {
      codes[j] = {{0, 0, 0, 0}};
      if (row + 32 * j < rows.end && col < cols.end) {
        codes[j] =
            load_global_16_written(reinterpret_cast<const uint8_t*>(d.codes) + (row + 32 * j) * d.code_stride + col);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) max_code = largest(max_code, largest_code(codes[j].w[i]));
    }
    max_code = max_over_block(max_code, cells + turn * kWarps);
    const NewScale scale = new_scale(d, unit, old_scale, max_code);
    if (!scale.finite) {
      report_block(record, rows, cols, old_scale, result);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kRequantSteps; ++j) {
      if (row + 32 * j >= rows.end || col >= cols.end) continue;
      Words4 out;
#pragma unroll
      for (int i = 0; i < 4; ++i) out.w[i] = requantised(codes[j].w[i], old_scale, scale.reciprocal);
      store_global_16(reinterpret_cast<uint8_t*>(d.dst) + (row + 32 * j) * d.dst_stride[0] + col, out);
    }
  }
}

// The same for any strides and extents. A thread writes only codes that it alone reads.
__global__ void __launch_bounds__(kThreads)
    requantise_elements_kernel(const TransformRecord* records, const Unit* units, uint32_t num_units, uint8_t*,
                               Result* result) {
  WSYNC_SHARED(uint32_t, cells, 2 * kWarps);
  uint32_t turn = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x, turn ^= 1) {
    const Unit unit = units[u];
    const TransformRecord& record = records[unit.record];
    const TransformDesc& d = record.d;
    const Span rows = block_span(unit.y, 0, d.extent[0]);
    const Span cols = block_span(unit.x, 0, d.extent[1]);
    const int64_t width = cols.end - cols.begin;
    const int64_t total = width * (rows.end - rows.begin);
    const float old_scale = code_scale(d, rows.begin, cols.begin);
    const auto code_at = [&](int64_t i) {
      return load_global<uint8_t>(reinterpret_cast<const uint8_t*>(d.codes) + (rows.begin + i / width) * d.code_stride +
                                  cols.begin + i % width);
    };
    uint32_t max_code = 0;
    for (int64_t i = threadIdx.x; i < total; i += kThreads) max_code = largest(max_code, code_at(i) & 0x7fu);
    max_code = max_over_block(max_code, cells + turn * kWarps);
    const NewScale scale = new_scale(d, unit, old_scale, max_code);
    if (!scale.finite) {
      report_block(record, rows, cols, old_scale, result);
      continue;
    }
    for (int64_t i = threadIdx.x; i < total; i += kThreads) {
      const uint8_t code = static_cast<uint8_t>(requantised(code_at(i), old_scale, scale.reciprocal));
      store_global(reinterpret_cast<uint8_t*>(d.dst) + (rows.begin + i / width) * d.dst_stride[0] +
                       (cols.begin + i % width) * d.dst_stride[1],
                   code);
    }
  }
}

}  // namespace cuda
}  // namespace wsync
