// Codecs of single values. Every vector kernel must give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace wsync {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float f32_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float f32_of_bf16(uint16_t bits) { return f32_of(static_cast<uint32_t>(bits) << 16); }

// From here on |x| rounds to infinity in bf16 (or is infinite or NaN already).
constexpr uint32_t kF32Bf16Overflow = 0x7f7f8000u;
constexpr uint32_t kF32Infinity = 0x7f800000u;
constexpr uint16_t kBf16Infinity = 0x7f80u;
constexpr uint16_t kF16Infinity = 0x7c00u;
constexpr uint32_t kF64InfinityHigh = 0x7ff00000u;  // the upper half of the bits; at or above it: not finite

// Round to nearest, ties to even. A NaN may become any non-finite or finite pattern: callers reject it before.
inline uint16_t bf16_of_f32_bits(uint32_t bits) {
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half to f32, exact.
inline float f32_of_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= kF16Infinity) return f32_of(sign | kF32Infinity | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x400u) return f32_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return f32_of(sign | ((magnitude << 13) + (112u << 23)));
}

// e4m3fn of an f32, to nearest, ties to even; -0 is kept; magnitudes above 448 (NaN too) become 448.
inline uint8_t e4m3_of_f32(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;
  // Below 2^-6 the step is 2^-9 = ulp(2^14): adding 2^14 rounds there. Above, drop 20 mantissa bits and rebias.
  const uint32_t code = magnitude < 0x3c800000u ? bits_of(f32_of(magnitude) + 16384.0f) - 0x46800000u
                                                : ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - 960u;
  return static_cast<uint8_t>(sign | code);
}

// The amax below which all blocks get the same scale (1e-4, as DeepGEMM and vLLM have it).
constexpr float kAmaxFloor = 1e-4f;
constexpr float kE4m3Max = 448.0f;

// Scale of recipe fp8_block128_f32: amax / 448, true division. Source: vLLM per_block_cast_to_fp8.
inline float scale_f32(float amax) { return (amax < kAmaxFloor ? kAmaxFloor : amax) / kE4m3Max; }

// Scale of recipe fp8_block128: the power of two at or above amax / 448. Source: DeepGEMM ceil_to_ue8m0.
inline float scale_pow2(float amax) {
  const uint32_t bits = bits_of(scale_f32(amax));
  uint32_t exponent = (bits >> 23) & 0xffu;
  if (bits & 0x7fffffu) ++exponent;
  exponent = exponent < 1u ? 1u : (exponent > 254u ? 254u : exponent);
  return f32_of(exponent << 23);
}

}  // namespace wsync
