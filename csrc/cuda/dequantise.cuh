// Encoded matrices by value.
#pragma once

#include "cuda/decode.cuh"

namespace wsync {
namespace cuda {

// Codes of one vector of 16 bytes; nvfp4 has two in a byte.
template <bool kFp4>
constexpr int kVectorCodes = kFp4 ? 32 : 16;

// The values of a lane's half of a vector, two at a time.
template <bool kFp4>
__device__ __forceinline__ void decode_pair(const uint32_t (&half)[2], int pair, float scale, float* low, float* high) {
  if (kFp4) {
    const uint32_t codes = half[pair / 4] >> (8 * (pair % 4));
    *low = mul_rn(f32_of_e2m1(codes & 15u), scale);
    *high = mul_rn(f32_of_e2m1(codes >> 4 & 15u), scale);
  } else {
    cvt_f32x2_e4m3(static_cast<uint16_t>(half[pair / 2] >> (16 * (pair % 2))), low, high);
    *low = mul_rn(*low, scale);
    *high = mul_rn(*high, scale);
  }
}

// Stores the values of half a vector, 16 bytes at a time.
template <int kDst, bool kFp4>
__device__ __forceinline__ void store_half(uint8_t* dst, const uint32_t (&half)[2], float scale) {
  constexpr int kPairsPerStore = kDst == kSrcF32 ? 2 : 4;
#pragma unroll
  for (int at = 0; at < kVectorCodes<kFp4> / 4; at += kPairsPerStore) {
    Words4 words;
#pragma unroll
    for (int i = 0; i < kPairsPerStore; ++i) {
      float low, high;
      decode_pair<kFp4>(half, at + i, scale, &low, &high);
      if (kDst == kSrcF32) {
        words.w[2 * i % 4] = bits_of(low);
        words.w[(2 * i + 1) % 4] = bits_of(high);
      } else {
        words.w[i] = kDst == kSrcBf16 ? cvt_bf16x2(low, high) : cvt_f16x2(low, high);
      }
    }
    store_global_16(dst + at / kPairsPerStore * 16, words);
  }
}

// A unit: vectors [x, x + n) of the record's codes; x is a multiple of 32. A lane loads one vector, and after an
// exchange stores its half of two: full sectors both ways. A half never crosses the border of a scale.
template <int kDst, bool kFp4>
__global__ void __launch_bounds__(kThreads, 3)
    dequantise_kernel(const TransformRecord* records, const Unit* units, uint32_t num_units, uint8_t*, Result*) {
  constexpr int64_t kDstBytes = kDst == kSrcF32 ? 4 : 2;
  const bool odd = threadIdx.x % 2 != 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const TransformRecord& record = records[unit.record];
    const TransformDesc& d = record.d;
    const uint32_t end = unit.x + unit.n;
    for (uint32_t base = unit.x + warp_idx() * kWarp; base < end; base += kThreads) {
      const uint32_t pair = base + lane_idx() / 2;
      const uint32_t own = pair + (odd ? kWarp / 2 : 0);
      Words4 codes = {{0, 0, 0, 0}};
      if (own < end) {
        const uint32_t row = divide(own, record.vectors_per_row);
        const uint32_t col = own - row * record.vectors_per_row.divisor;
        codes = load_global_16(reinterpret_cast<const uint8_t*>(d.codes) + row * d.code_stride + 16 * col);
      }
      const uint32_t low[2] = {codes.w[0], codes.w[1]};
      const uint32_t high[2] = {codes.w[2], codes.w[3]};
      uint32_t halves[4];
      exchange_halves(low, high, odd, halves);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t vector = pair + static_cast<uint32_t>(i) * (kWarp / 2);
        if (vector >= end) continue;
        const auto row = static_cast<int64_t>(divide(vector, record.vectors_per_row));
        const int64_t first = (vector - row * record.vectors_per_row.divisor) * kVectorCodes<kFp4>;
        const int64_t col = first + (odd ? kVectorCodes<kFp4> / 2 : 0);
        const uint32_t half[2] = {halves[2 * i], halves[2 * i + 1]};
        store_half<kDst, kFp4>(reinterpret_cast<uint8_t*>(d.dst) + (row * d.dst_stride[0] + col) * kDstBytes, half,
                               code_scale(d, row, col));
      }
    }
  }
}

// A unit: values [x, x + n) in packed order, for any strides.
__global__ void __launch_bounds__(kThreads)
    dequantise_elements_kernel(const TransformRecord* records, const Unit* units, uint32_t num_units, uint8_t*,
                               Result*) {
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const TransformDesc& d = records[unit.record].d;
    for (uint32_t i = unit.x + threadIdx.x; i < unit.x + unit.n; i += kThreads) {
      const auto cols = static_cast<uint32_t>(d.extent[1]);
      const uint32_t row = i / cols;
      const uint32_t col = i - row * cols;
      store_decoded(d, row, col, decoded_element(d, row, col));
    }
  }
}

}  // namespace cuda
}  // namespace wsync
