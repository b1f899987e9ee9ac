// The scalar twin of the row kernels.
#include <algorithm>
#include <cstring>

#include "core/dtype.h"
#include "cpu/kernels.h"
#include "cpu/rows_scalar.h"

namespace wsync {
namespace {

// The sources may be unaligned.
struct Bf16Source {
  static float value(const void* src, size_t i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const uint8_t*>(src) + 2 * i, 2);
    return f32_of_bf16(bits);
  }
};

struct F32Source {
  static float value(const void* src, size_t i) {
    float value;
    std::memcpy(&value, static_cast<const uint8_t*>(src) + 4 * i, 4);
    return value;
  }
};

template <typename Source>
uint32_t magnitude(const void* src, size_t i) {
  return bits_of(Source::value(src, i)) & 0x7fffffffu;
}

template <typename Source>
uint32_t largest_of(const void* src, size_t begin, size_t n) {
  uint32_t largest = 0;
  for (size_t i = begin; i < begin + n; ++i) largest = std::max(largest, magnitude<Source>(src, i));
  return largest;
}

template <typename Source>
uint32_t largest(const void* src, size_t n) {
  return largest_of<Source>(src, 0, n);
}

uint64_t digest(const void* src, size_t nbytes, uint64_t first_word) {
  return scalar_kernels().digest(src, nbytes, first_word);
}

template <typename Source>
uint64_t multiply(uint8_t* dst, const void* src, size_t n, float factor, uint64_t first_word, uint32_t* max_bits) {
  for (size_t i = 0; i < n; ++i) dst[i] = e4m3_of_f32(Source::value(src, i) * factor);
  *max_bits = std::max(*max_bits, largest<Source>(src, n));
  return digest(dst, n, first_word);
}

template <typename Source>
uint64_t divide(uint8_t* dst, const void* src, size_t n, float divisor, uint64_t first_word, uint32_t* max_bits) {
  for (size_t i = 0; i < n; ++i) dst[i] = e4m3_of_f32(Source::value(src, i) / divisor);
  *max_bits = std::max(*max_bits, largest<Source>(src, n));
  return digest(dst, n, first_word);
}

template <typename Source>
uint64_t mxfp8(uint8_t* dst, uint8_t* scales, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits) {
  for (size_t at = 0; at < n; at += kMxGroup) {
    const uint32_t amax = largest_of<Source>(src, at, kMxGroup);
    *max_bits = std::max(*max_bits, amax);
    const uint8_t scale = scale_mxfp8(f32_of(amax));
    const float reciprocal = reciprocal_e8m0(scale);
    *scales++ = scale;
    for (size_t i = at; i < at + kMxGroup; ++i) dst[i] = e4m3_of_f32(Source::value(src, i) * reciprocal);
  }
  return digest(dst, n, first_word);
}

template <typename Source>
uint64_t nvfp4(uint8_t* dst, uint8_t* scales, const void* src, size_t n, float scale2, uint64_t first_word,
               uint32_t* max_bits) {
  for (size_t at = 0; at < n; at += kNvGroup) {
    const uint32_t amax = largest_of<Source>(src, at, kNvGroup);
    *max_bits = std::max(*max_bits, amax);
    const uint8_t scale = scale_nvfp4(f32_of(amax), scale2);
    const float divisor = f32_of_e4m3(scale) * scale2;
    *scales++ = scale;
    for (size_t i = at; i < at + kNvGroup; i += 2) {
      const uint32_t even = e2m1_of_f32(Source::value(src, i) / divisor);
      const uint32_t odd = e2m1_of_f32(Source::value(src, i + 1) / divisor);
      dst[i / 2] = static_cast<uint8_t>(even | odd << 4);
    }
  }
  return digest(dst, n / 2, first_word);
}

template <typename Source>
RowKernels table() {
  return {largest<Source>, multiply<Source>, divide<Source>, mxfp8<Source>, nvfp4<Source>};
}

}  // namespace

RowKernels scalar_bf16_rows() { return table<Bf16Source>(); }
RowKernels scalar_f32_rows() { return table<F32Source>(); }

}  // namespace wsync
