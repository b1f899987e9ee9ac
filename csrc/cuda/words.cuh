// The road for whatever has no 16-byte vectors: odd extents, strides and addresses. A thread makes one digest word of 8
// packed bytes, element by element, for any operation.
#pragma once

#include "cuda/codec.cuh"
#include "cuda/move.cuh"

namespace wsync {
namespace cuda {

constexpr int kWordBytes = 8;

// Element offset of the packed index `idx` of a box, which has less than 2^31 elements.
__device__ __forceinline__ int64_t box_offset(const int64_t (&extent)[kNumDims], const int64_t (&stride)[kNumDims],
                                              uint32_t idx) {
  int64_t offset = 0;
#pragma unroll 1
  for (int dim = kNumDims - 1; dim > 0 && idx != 0; --dim) {
    const auto n = static_cast<uint32_t>(extent[dim]);
    const uint32_t outer = idx / n;
    offset += static_cast<int64_t>(idx - outer * n) * stride[dim];
    idx = outer;
  }
  return offset + static_cast<int64_t>(idx) * stride[0];
}

__device__ __forceinline__ int64_t box_numel(const int64_t (&extent)[kNumDims]) {
  return extent[0] * extent[1] * extent[2] * extent[3];
}

__device__ __forceinline__ uint64_t load_element(const uint8_t* at, int32_t elem_bytes) {
  if (elem_bytes == 1) return load_global<uint8_t>(at);
  if (elem_bytes == 2) return load_global<uint16_t>(at);
  if (elem_bytes == 4) return load_global<uint32_t>(at);
  return load_global<uint64_t>(at);
}

__device__ __forceinline__ void store_element(uint8_t* at, int32_t elem_bytes, uint64_t value) {
  if (elem_bytes == 1) store_global(at, static_cast<uint8_t>(value));
  if (elem_bytes == 2) store_global(at, static_cast<uint16_t>(value));
  if (elem_bytes == 4) store_global(at, static_cast<uint32_t>(value));
  if (elem_bytes == 8) store_global(at, value);
}

// The dtype whose rule a value follows: every f32 that becomes bf16 is bad if it becomes infinite.
__device__ __forceinline__ int32_t checked_dtype(const PackDesc& d) {
  return d.op == kOpBf16 && d.src_dtype == kSrcF32Exact ? static_cast<int32_t>(kSrcF32) : d.src_dtype;
}

__device__ __forceinline__ uint64_t bf16_element(const uint8_t* at, int32_t src_dtype) {
  if (src_dtype == kSrcBf16) return load_global<uint16_t>(at);
  return bf16_of_f32_bits(bits_of(element_value(at, src_dtype)));
}

// The code of one value by an operation whose scales are in the table.
__device__ __forceinline__ uint32_t quantised_element(const PackDesc& d, const uint8_t* at, int64_t row, int64_t col) {
  const float x = element_value(at, d.src_dtype);
  const auto* scales = reinterpret_cast<const float*>(d.scales);
  const auto* bytes = reinterpret_cast<const uint8_t*>(d.scales);
  switch (d.op) {
    case kOpFp8Channel:
    case kOpFp8ChannelScaled:
      return e4m3_of_f32(div_rn(x, load_global<float>(scales + row * d.scale_stride)));
    case kOpFp8Tensor:
      return e4m3_of_f32(mul_rn(x, multiplier_tensor(load_global<float>(reinterpret_cast<const void*>(d.amax)))));
    case kOpMxfp8: {
      const uint8_t exponent = load_global<uint8_t>(bytes + row * d.scale_stride + col / kMxGroup);
      return e4m3_of_f32(mul_rn(x, reciprocal_e8m0(exponent)));
    }
    case kOpNvfp4: {
      const float scale2 = scale2_nvfp4(load_global<float>(reinterpret_cast<const void*>(d.amax)));
      const uint8_t scale = load_global<uint8_t>(bytes + row * d.scale_stride + col / kNvGroup);
      return e2m1_of_f32(div_rn(x, mul_rn(f32_of_e4m3(scale), scale2)));
    }
    default: {
      const int64_t block_row = (row + d.row_phase) / kScaleBlock;
      const int64_t block_col = (col + d.col_phase) / kScaleBlock;
      const float scale = load_global<float>(scales + block_row * d.scale_stride + block_col);
      return e4m3_of_f32(mul_rn(x, div_rn(1.0f, scale)));
    }
  }
}

// The bits of one packed element, `at` being its source.
__device__ __forceinline__ uint64_t packed_element(const PackDesc& d, const uint8_t* at, uint32_t idx) {
  if (d.op == kOpCopy) return load_element(at, d.elem_bytes);
  if (d.op == kOpBf16) return bf16_element(at, d.src_dtype);
  const auto cols = static_cast<uint32_t>(d.extent[3]);
  return quantised_element(d, at, idx / cols, idx % cols);
}

__device__ __forceinline__ int packed_bits(const PackDesc& d) {
  if (d.op == kOpCopy) return 8 * d.elem_bytes;
  if (d.op == kOpBf16) return 16;
  return d.op == kOpNvfp4 ? 4 : 8;
}

// A unit: words [x, x + n) of the packed box.
__global__ void __launch_bounds__(kThreads, 4)
    pack_words_kernel(const PackRecord* records, const Unit* units, uint32_t num_units, uint8_t* dst_base,
                      Result* result) {
  uint64_t sum = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const PackRecord& record = records[unit.record];
    const PackDesc& d = record.d;
    const int bits = packed_bits(d);
    const auto numel = static_cast<uint32_t>(box_numel(d.extent));
    const auto per_word = static_cast<uint32_t>(64 / bits);
    for (uint32_t w = unit.x + threadIdx.x; w < unit.x + unit.n; w += kThreads) {
      const uint32_t first = w * per_word;
      uint64_t word = 0;
      int filled = 0;
#pragma unroll 1
      for (uint32_t idx = first; filled < 64 && idx < numel; ++idx, filled += bits) {
        const auto* at =
            reinterpret_cast<const uint8_t*>(d.src) + box_offset(d.extent, d.src_stride, idx) * d.elem_bytes;
        if (moved_nonfinite(at, checked_dtype(d))) {
          atomicMin(&result->bad, bad_key(record.desc_idx, idx));
        }
        word |= packed_element(d, at, idx) << filled;
      }
      uint8_t* dst = dst_base + d.dst_offset + static_cast<uint64_t>(w) * kWordBytes;
      if (filled == 64 && reinterpret_cast<uint64_t>(dst) % kWordBytes == 0) {
        store_global(dst, word);
      } else {
#pragma unroll 1
        for (int i = 0; 8 * i < filled; ++i) store_global(dst + i, static_cast<uint8_t>(word >> (8 * i)));
      }
      sum += digest_word(word, digest_key(d.wire_word + w));
    }
  }
  add_digest(sum, result);
}

__device__ __forceinline__ uint64_t unpacked_element(const UnpackDesc& d, const uint8_t* src, uint32_t idx) {
  if (d.op == kUnpackFill) return d.fill;
  const int64_t offset = box_offset(d.extent, d.src_stride, idx);
  if (d.op == kUnpackExponent) return load_global<uint32_t>(src + 4 * offset) >> 23 & 0xffu;
  return load_element(src + offset * d.elem_bytes, d.elem_bytes);
}

// A unit: words [x, x + n) of the packed form of what is written.
__global__ void __launch_bounds__(kThreads, 4)
    unpack_words_kernel(const UnpackRecord* records, const Unit* units, uint32_t num_units, uint8_t* src_base,
                        Result* result) {
  uint64_t sum = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const UnpackRecord& record = records[unit.record];
    const UnpackDesc& d = record.d;
    const auto numel = static_cast<uint32_t>(box_numel(d.extent));
    const auto per_word = static_cast<uint32_t>(kWordBytes / d.elem_bytes);
    for (uint32_t w = unit.x + threadIdx.x; w < unit.x + unit.n; w += kThreads) {
      uint64_t word = 0;
#pragma unroll 1
      for (uint32_t i = 0; i < per_word; ++i) {
        const uint32_t idx = w * per_word + i;
        if (idx >= numel) break;
        auto* dst = reinterpret_cast<uint8_t*>(d.dst) + box_offset(d.extent, d.dst_stride, idx) * d.elem_bytes;
        uint64_t element;
        if (record.installed) {
          element = load_element(dst, d.elem_bytes);
        } else {
          element = unpacked_element(d, src_base + d.src_offset, idx);
          if (d.elem_bytes < kWordBytes) element &= (uint64_t{1} << (8 * d.elem_bytes)) - 1;
          store_element(dst, d.elem_bytes, element);
        }
        word |= element << (8 * static_cast<uint32_t>(d.elem_bytes) * i);
      }
      if (d.wire_word != kUncountedWord) sum += digest_word(word, digest_key(d.wire_word + w));
    }
  }
  add_digest(sum, result);
}

}  // namespace cuda
}  // namespace wsync
