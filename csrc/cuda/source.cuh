// Source values in vectors of 16, of which a lane holds 8: lanes 2i and 2i + 1 share a vector, so that each load of a
// warp takes whole sectors and, after one exchange of codes, each store has 16 bytes.
//
// `max2` is the maximum of magnitudes as bits shifted left by one, which drops the sign: f32 bits, those of 16-bit
// floats in the upper half (the lower half then only breaks ties and is dropped at the end).
#pragma once

#include "core/descriptors.h"
#include "cuda/warp.cuh"

namespace wsync {
namespace cuda {

constexpr int kHalfElems = kVectorElems / 2;

// 8 values of 16 bits.
struct Half16 {
  uint32_t w[4];
};

// 8 values of 32 bits.
struct Half32 {
  uint32_t w[8];
};

__device__ __forceinline__ void raise(uint32_t* max2, uint32_t value2) { *max2 = largest(*max2, value2); }

// The half `odd` of a vector of 16-bit floats; zeros if not `active`.
__device__ __forceinline__ Half16 load_half16(const uint8_t* vector, bool odd, bool active, uint32_t* max2) {
  Half16 half = {{0, 0, 0, 0}};
  if (active) {
    const Words4 words = load_global_16(vector + (odd ? 16 : 0));
#pragma unroll
    for (int i = 0; i < 4; ++i) half.w[i] = words.w[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raise(max2, half.w[i] << 17);
    raise(max2, half.w[i] << 1);
  }
  return half;
}

// Words 0-3 and 8-11 (odd: 4-7 and 12-15) of a vector of 32-bit floats.
__device__ __forceinline__ void load_words32(const uint8_t* vector, bool odd, bool active, uint32_t (&a)[4],
                                             uint32_t (&b)[4], uint32_t* max2) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = b[i] = 0;
  if (active) {
    const uint8_t* at = vector + (odd ? 16 : 0);
    const Words4 first = load_global_16(at);
    const Words4 second = load_global_16(at + 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = first.w[i];
      b[i] = second.w[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raise(max2, a[i] << 1);
    raise(max2, b[i] << 1);
  }
}

template <int kSrc>
struct Source;

template <>
struct Source<kSrcBf16> {
  using Half = Half16;
  static constexpr int kBytes = 2;
  static constexpr uint32_t kNonfinite2 = kF32Infinity << 1;

  static __device__ __forceinline__ Half load(const uint8_t* vector, bool odd, bool active, uint32_t* max2) {
    return load_half16(vector, odd, active, max2);
  }
  static __device__ __forceinline__ float value(const Half& half, int i) {
    return f32_of(i % 2 == 0 ? half.w[i / 2] << 16 : half.w[i / 2] & 0xffff0000u);
  }
  static __device__ __forceinline__ float amax(uint32_t max2) { return f32_of(max2 >> 1 & 0x7fff0000u); }
};

template <>
struct Source<kSrcF16> {
  using Half = Half16;
  static constexpr int kBytes = 2;
  static constexpr uint32_t kNonfinite2 = static_cast<uint32_t>(kF16Infinity) << 17;

  static __device__ __forceinline__ Half load(const uint8_t* vector, bool odd, bool active, uint32_t* max2) {
    return load_half16(vector, odd, active, max2);
  }
  static __device__ __forceinline__ float value(const Half& half, int i) {
    return cvt_f32_f16(static_cast<uint16_t>(i % 2 == 0 ? half.w[i / 2] : half.w[i / 2] >> 16));
  }
  static __device__ __forceinline__ float amax(uint32_t max2) { return cvt_f32_f16(static_cast<uint16_t>(max2 >> 17)); }
};

// f32, rounded to bf16 as it is loaded. The maximum is that of the unrounded values: rounding keeps order, and a value
// that rounds to infinity must be seen.
template <>
struct Source<kSrcF32> {
  using Half = Half16;
  static constexpr int kBytes = 4;
  static constexpr uint32_t kNonfinite2 = kF32Bf16Overflow << 1;

  static __device__ __forceinline__ Half load(const uint8_t* vector, bool odd, bool active, uint32_t* max2) {
    uint32_t a[4], b[4], first[2], second[2];
    load_words32(vector, odd, active, a, b, max2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[i] = cvt_bf16x2(f32_of(a[2 * i]), f32_of(a[2 * i + 1]));
      second[i] = cvt_bf16x2(f32_of(b[2 * i]), f32_of(b[2 * i + 1]));
    }
    Half half;
    exchange_halves(first, second, odd, half.w);
    return half;
  }
  static __device__ __forceinline__ float value(const Half& half, int i) { return Source<kSrcBf16>::value(half, i); }
  static __device__ __forceinline__ float amax(uint32_t max2) {
    return f32_of(static_cast<uint32_t>(bf16_of_f32_bits(max2 >> 1)) << 16);
  }
};

template <>
struct Source<kSrcF32Exact> {
  using Half = Half32;
  static constexpr int kBytes = 4;
  static constexpr uint32_t kNonfinite2 = kF32Infinity << 1;

  static __device__ __forceinline__ Half load(const uint8_t* vector, bool odd, bool active, uint32_t* max2) {
    uint32_t a[4], b[4];
    load_words32(vector, odd, active, a, b, max2);
    Half half;
    exchange_halves(a, b, odd, half.w);
    return half;
  }
  static __device__ __forceinline__ float value(const Half& half, int i) { return f32_of(half.w[i]); }
  static __device__ __forceinline__ float amax(uint32_t max2) { return f32_of(max2 >> 1); }
};

// Single elements, for what is not a vector and for finding the first bad one.

__device__ __forceinline__ int64_t source_elem_bytes(int32_t src_dtype) {
  return src_dtype == kSrcBf16 || src_dtype == kSrcF16 ? 2 : 4;
}

// Whether the element counts as non-finite; the same rule as the CPU's is_nonfinite.
__device__ __forceinline__ bool element_nonfinite(const uint8_t* at, int32_t src_dtype) {
  if (src_dtype == kSrcBf16) return (load_global<uint16_t>(at) & 0x7fffu) >= kBf16Infinity;
  if (src_dtype == kSrcF16) return (load_global<uint16_t>(at) & 0x7fffu) >= kF16Infinity;
  const uint32_t magnitude = load_global<uint32_t>(at) & 0x7fffffffu;
  return magnitude >= (src_dtype == kSrcF32 ? kF32Bf16Overflow : kF32Infinity);
}

// The f32 that a recipe sees.
__device__ __forceinline__ float element_value(const uint8_t* at, int32_t src_dtype) {
  if (src_dtype == kSrcBf16) return f32_of_bf16(load_global<uint16_t>(at));
  if (src_dtype == kSrcF16) return cvt_f32_f16(load_global<uint16_t>(at));
  const uint32_t bits = load_global<uint32_t>(at);
  return src_dtype == kSrcF32 ? f32_of_bf16(bf16_of_f32_bits(bits)) : f32_of(bits);
}

__device__ __forceinline__ const uint8_t* element_address(const PackDesc& d, int64_t row, int64_t col) {
  return reinterpret_cast<const uint8_t*>(d.src) +
         (row * d.src_stride[2] + col * d.src_stride[3]) * source_elem_bytes(d.src_dtype);
}

// Reports the first non-finite element of a row's columns [begin, end), if there is one.
__device__ __forceinline__ void report_row(const PackRecord& record, int64_t row, int64_t begin, int64_t end,
                                           Result* result) {
  const PackDesc& d = record.d;
#pragma unroll 1
  for (int64_t col = begin; col < end; ++col) {
    if (!element_nonfinite(element_address(d, row, col), d.src_dtype)) continue;
    atomicMin(&result->bad, bad_key(record.desc_idx, static_cast<uint64_t>(row * d.extent[3] + col)));
    return;
  }
}

}  // namespace cuda
}  // namespace wsync
