// Values of codes: code * scale, one rounding. Source of the rules: wsync.formats.dequantize_reference.
#pragma once

#include "cuda/warp.cuh"

namespace wsync {
namespace cuda {

// The scale of one value.
__device__ __forceinline__ float code_scale(const TransformDesc& d, int64_t row, int64_t col) {
  const auto* scales = reinterpret_cast<const float*>(d.scales);
  const auto* bytes = reinterpret_cast<const uint8_t*>(d.scales);
  switch (d.recipe_op) {
    case kOpFp8Channel:
    case kOpFp8ChannelScaled:
      return load_global<float>(scales + row * d.scale_stride);
    case kOpFp8Tensor:
      return load_global<float>(scales);
    case kOpMxfp8:
      return f32_of_e8m0(load_global<uint8_t>(bytes + row * d.scale_stride + col / kMxGroup));
    case kOpNvfp4: {
      const float scale = f32_of_e4m3(load_global<uint8_t>(bytes + row * d.scale_stride + col / kNvGroup));
      return mul_rn(scale, load_global<float>(reinterpret_cast<const void*>(d.tensor_scale)));
    }
    default:
      return load_global<float>(scales + (row + d.row_phase) / kScaleBlock * d.scale_stride +
                                (col + d.col_phase) / kScaleBlock);
  }
}

__device__ __forceinline__ float decoded_element(const TransformDesc& d, int64_t row, int64_t col) {
  const auto* codes = reinterpret_cast<const uint8_t*>(d.codes) + row * d.code_stride;
  const float scale = code_scale(d, row, col);
  if (d.recipe_op != kOpNvfp4) return mul_rn(f32_of_e4m3(load_global<uint8_t>(codes + col)), scale);
  const uint32_t pair = load_global<uint8_t>(codes + col / 2);
  return mul_rn(f32_of_e2m1(col % 2 == 0 ? pair & 15u : pair >> 4), scale);
}

// bf16 of any f32: the rounding of finite values, and a NaN that stays one.
__device__ __forceinline__ void store_decoded(const TransformDesc& d, int64_t row, int64_t col, float value) {
  const int64_t offset = row * d.dst_stride[0] + col * d.dst_stride[1];
  if (d.dst_dtype == kSrcF32) return store_global(reinterpret_cast<float*>(d.dst) + offset, value);
  const uint32_t pair = d.dst_dtype == kSrcBf16 ? cvt_bf16x2(value, 0.0f) : cvt_f16x2(value, 0.0f);
  store_global(reinterpret_cast<uint16_t*>(d.dst) + offset, static_cast<uint16_t>(pair));
}

}  // namespace cuda
}  // namespace wsync
