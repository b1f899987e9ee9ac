// Codecs of single values, for the host and for CUDA. Every vector kernel must give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define WSYNC_HD __host__ __device__ __forceinline__
#else
#define WSYNC_HD inline
#endif

namespace wsync {

WSYNC_HD uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

WSYNC_HD float f32_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

WSYNC_HD float f32_of_bf16(uint16_t bits) { return f32_of(static_cast<uint32_t>(bits) << 16); }

// From here on |x| rounds to infinity in bf16 (or is infinite or NaN already).
constexpr uint32_t kF32Bf16Overflow = 0x7f7f8000u;
constexpr uint32_t kF32Infinity = 0x7f800000u;
constexpr uint16_t kBf16Infinity = 0x7f80u;
constexpr uint16_t kF16Infinity = 0x7c00u;
constexpr uint32_t kF64InfinityHigh = 0x7ff00000u;  // the upper half of the bits; at or above it: not finite

// Round to nearest, ties to even. A NaN may become any non-finite or finite pattern: callers reject it before.
WSYNC_HD uint16_t bf16_of_f32_bits(uint32_t bits) {
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half to f32, exact.
WSYNC_HD float f32_of_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= kF16Infinity) return f32_of(sign | kF32Infinity | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x400u) return f32_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return f32_of(sign | ((magnitude << 13) + (112u << 23)));
}

// IEEE half of an f32, to nearest, ties to even: finite values beyond the largest half become infinite, NaN stays NaN.
WSYNC_HD uint16_t f16_of_f32(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > kF32Infinity) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | kF16Infinity);
  // Below 2^-14 the step is 2^-24 = ulp(1/2): adding 1/2 rounds there. Above, drop 13 mantissa bits and rebias.
  const uint32_t half = magnitude < 0x38800000u
                            ? bits_of(f32_of(magnitude) + 0.5f) - 0x3f000000u
                            : ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  return static_cast<uint16_t>(sign | half);
}

// e4m3fn of an f32, to nearest, ties to even; -0 is kept; magnitudes above 448 (NaN too) become 448.
WSYNC_HD uint8_t e4m3_of_f32(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;
  // Below 2^-6 the step is 2^-9 = ulp(2^14): adding 2^14 rounds there. Above, drop 20 mantissa bits and rebias.
  const uint32_t code = magnitude < 0x3c800000u ? bits_of(f32_of(magnitude) + 16384.0f) - 0x46800000u
                                                : ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - 960u;
  return static_cast<uint8_t>(sign | code);
}

// The value of an e4m3fn code; 0x7f and 0xff are NaN.
WSYNC_HD float f32_of_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return f32_of(sign | 0x7fc00000u);
  if (magnitude < 8u) return f32_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-9f));
  return f32_of(sign | ((magnitude << 20) + (120u << 23)));
}

// e2m1 of an f32: 0, 0.5, 1, 1.5, 2, 3, 4, 6 to nearest, ties to even; saturates at 6. The sign is that of value < 0,
// so -0 loses it and a small negative value keeps it. Source: ModelOpt NVFP4QTensor._cast_fp4.
WSYNC_HD uint8_t e2m1_of_f32(float value) {
  const float magnitude = value < 0.0f ? -value : value;
  uint32_t code = magnitude > 0.25f;
  code += magnitude >= 0.75f;
  code += magnitude > 1.25f;
  code += magnitude >= 1.75f;
  code += magnitude > 2.5f;
  code += magnitude >= 3.5f;
  code += magnitude > 5.0f;
  return static_cast<uint8_t>(code | (value < 0.0f ? 8u : 0u));
}

// The value of an e2m1 code.
WSYNC_HD float f32_of_e2m1(uint32_t code) {
  const uint32_t magnitude = code & 7u;
  const float value = magnitude < 2u ? 0.5f * static_cast<float>(magnitude)
                                     : f32_of(((magnitude >> 1) + 126u) << 23 | (magnitude & 1u) << 22);
  return code & 8u ? -value : value;
}

// The amax below which all blocks get the same scale (1e-4, as DeepGEMM and vLLM have it).
constexpr float kAmaxFloor = 1e-4f;
constexpr float kE4m3Max = 448.0f;

// Scale of recipe fp8_block128_f32: amax / 448, true division. Source: vLLM per_block_cast_to_fp8.
WSYNC_HD float scale_f32(float amax) { return (amax < kAmaxFloor ? kAmaxFloor : amax) / kE4m3Max; }

// Scale of recipe fp8_block128: the power of two at or above amax / 448. Source: DeepGEMM ceil_to_ue8m0.
WSYNC_HD float scale_pow2(float amax) {
  const uint32_t bits = bits_of(scale_f32(amax));
  uint32_t exponent = (bits >> 23) & 0xffu;
  if (bits & 0x7fffffu) ++exponent;
  exponent = exponent < 1u ? 1u : (exponent > 254u ? 254u : exponent);
  return f32_of(exponent << 23);
}

// Scale of a row in recipe fp8_channel: amax / 448, at least 1 / (448 * 512). Source: vLLM _fp8_channel_scale.
WSYNC_HD float scale_channel(float amax) {
  const float scale = amax / kE4m3Max;
  constexpr float kLeast = static_cast<float>(1.0 / (448.0 * 512.0));
  return scale < kLeast ? kLeast : scale;
}

// What recipe fp8_tensor multiplies by, and its scale. Source: SGLang input_to_float8.
WSYNC_HD float multiplier_tensor(float amax) { return (1.0f / (amax < 1e-12f ? 1e-12f : amax)) * kE4m3Max; }
WSYNC_HD float scale_tensor(float amax) { return 1.0f / multiplier_tensor(amax); }

// E8M0 byte of recipe mxfp8: the least power of two at or above amax / 448, 2^-127 being the least of all. Source:
// torchao ScaleCalculationMode.RCEIL.
WSYNC_HD uint8_t scale_mxfp8(float amax) {
  const uint32_t bits = bits_of(amax / kE4m3Max);
  const uint32_t exponent = bits >> 23;
  if (exponent == 0) return bits > 0x400000u ? 1 : 0;
  return static_cast<uint8_t>(exponent + ((bits & 0x7fffffu) != 0));
}
// The reciprocal of an E8M0 byte's power of two, and the power itself; exact. The power of 0xff is NaN.
WSYNC_HD float reciprocal_e8m0(uint8_t e) { return f32_of(e == 254u ? 0x400000u : (254u - e) << 23); }
WSYNC_HD float f32_of_e8m0(uint8_t e) {
  return f32_of(static_cast<uint32_t>(e) << 23 | (e == 0u || e == 255u ? 0x400000u : 0u));
}

// Recipe nvfp4. Source: ModelOpt NVFP4QTensor.get_weights_scaling_factor_2 and get_weights_scaling_factor.
// `weight_scale_2` of a tensor without a value to scale by is 1, where ModelOpt divides by zero.
WSYNC_HD float scale2_nvfp4(float amax) {
  const float scale2 = amax / (6.0f * 448.0f);
  return scale2 == 0.0f ? 1.0f : scale2;
}
// e4m3 code of a block's scale; a value is divided by f32_of_e4m3(code) * scale2.
WSYNC_HD uint8_t scale_nvfp4(float block_amax, float scale2) {
  float scale = block_amax / (6.0f * scale2);
  if (scale == 0.0f) scale = 1.0f;
  scale = scale < 0x1p-9f ? 0x1p-9f : (scale > kE4m3Max ? kE4m3Max : scale);
  return e4m3_of_f32(scale);
}

}  // namespace wsync
