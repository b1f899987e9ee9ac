// Recipes whose scale blocks lie in a row. Include after simd_stream.h and simd_codes.h.
#pragma once

#include "cpu/kernels.h"

namespace wsync {
namespace {

enum class Arithmetic { kMultiply, kDivide };

template <Arithmetic kOp>
inline V::I apply(V::F value, V::F factor) {
  return V::sticky(V::as_i(kOp == Arithmetic::kMultiply ? V::mul(value, factor) : V::div(value, factor)));
}

// What a factor applies to within a vector of 16-bit lanes, and what stands for the vector.
struct Factors {
  V::F first;
  V::F second;
};

struct Bf16Values {
  static constexpr int kValueBytes = 2;
  static constexpr int kVectorBytes = V::kBytes;  // of the values of a vector of 16-bit lanes

  template <Arithmetic kOp>
  static inline V::I scaled(const uint8_t* src, const Factors& by) {
    const V::I x = V::load(src);
    return V::interleave_high(apply<kOp>(V::as_f(V::even_high(x)), by.first),
                              apply<kOp>(V::as_f(V::odd_high(x)), by.second));
  }
  // Of `repeated`, which holds 8 times the factor of each group of 16 values.
  static inline Factors by_groups(const float* repeated) {
    const V::F factor = V::load_f(repeated);
    return {factor, factor};
  }
  static inline V::I raise(V::I worst, const uint8_t* src) {
    return V::max_u16(worst, V::and_(V::load(src), V::set16(0x7fff)));
  }
  static inline uint32_t bits(V::I worst) { return largest_bf16(worst); }
  // f32 bits of the largest magnitude of 16 values.
  static inline __m256i magnitudes(const uint8_t* src) {
    return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)), _mm256_set1_epi16(0x7fff));
  }
  static inline uint32_t largest16(const uint8_t* src) { return largest_bf16_of(magnitudes(src)); }
  static inline uint32_t largest32(const uint8_t* src) {
    return largest_bf16_of(_mm256_max_epu16(magnitudes(src), magnitudes(src + 32)));
  }
};

struct F32Values {
  static constexpr int kValueBytes = 4;
  static constexpr int kVectorBytes = 2 * V::kBytes;

  template <Arithmetic kOp>
  static inline V::I scaled(const uint8_t* src, const Factors& by) {
    return V::high_halves(apply<kOp>(V::as_f(V::load(src)), by.first),
                          apply<kOp>(V::as_f(V::load(src + V::kBytes)), by.second));
  }
  static inline Factors by_groups(const float* repeated) {
    return {V::set_f(repeated[0]), V::set_f(repeated[V::kLanes16 > kNvGroup ? 8 : 0])};
  }
  static inline V::I raise(V::I worst, const uint8_t* src) {
    const V::I magnitude = V::set32(0x7fffffff);
    const V::I low = V::and_(V::load(src), magnitude);
    return V::max_u32(worst, V::max_u32(low, V::and_(V::load(src + V::kBytes), magnitude)));
  }
  static inline uint32_t bits(V::I worst) { return largest_u32(worst); }
  static inline __m256i magnitudes(const uint8_t* src) {
    const auto* v = reinterpret_cast<const __m256i*>(src);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    return _mm256_max_epu32(_mm256_and_si256(_mm256_loadu_si256(v), magnitude),
                            _mm256_and_si256(_mm256_loadu_si256(v + 1), magnitude));
  }
  static inline uint32_t largest16(const uint8_t* src) { return largest_u32_of(magnitudes(src)); }
  static inline uint32_t largest32(const uint8_t* src) {
    return largest_u32_of(_mm256_max_epu32(magnitudes(src), magnitudes(src + 64)));
  }
};

template <typename Values>
uint32_t largest(const void* src_, size_t n) {
  const auto* src = static_cast<const uint8_t*>(src_);
  const size_t nbytes = n * Values::kValueBytes;
  V::I worst0 = V::zero();
  V::I worst1 = V::zero();
  size_t i = 0;
  for (; i + 2 * Values::kVectorBytes <= nbytes; i += 2 * Values::kVectorBytes) {
    worst0 = Values::raise(worst0, src + i);
    worst1 = Values::raise(worst1, src + i + Values::kVectorBytes);
  }
  for (; i < nbytes; i += Values::kVectorBytes) {
    alignas(64) uint8_t in[Values::kVectorBytes] = {};
    std::memcpy(in, src + i, std::min<size_t>(Values::kVectorBytes, nbytes - i));
    worst0 = Values::raise(worst0, in);
  }
  return std::max(Values::bits(worst0), Values::bits(worst1));
}

// One factor for all values.
template <typename Values, Arithmetic kOp>
struct ScaleStage {
  static constexpr int kSrcBytes = 2 * Values::kVectorBytes;
  CodeMaker codes;
  Factors by;
  V::I worst;

  explicit ScaleStage(float factor) : codes(127), by{V::set_f(factor), V::set_f(factor)}, worst(V::zero()) {}

  inline V::I operator()(const uint8_t* src) {
    const uint8_t* next = src + Values::kVectorBytes;
    worst = Values::raise(Values::raise(worst, src), next);
    return codes(saturate_e4m3(Values::template scaled<kOp>(src, by)),
                 saturate_e4m3(Values::template scaled<kOp>(next, by)));
  }
};

template <typename Values, Arithmetic kOp>
uint64_t scale(uint8_t* dst, const void* src, size_t n, float factor, uint64_t first_word, uint32_t* max_bits) {
  ScaleStage<Values, kOp> stage(factor);
  const uint64_t sum = stream(dst, src, n, first_word, stage);
  *max_bits = std::max(*max_bits, Values::bits(stage.worst));
  return sum;
}

// Groups whose scales are made before their codes: as many as fit the L1 cache with their values.
constexpr size_t kGroupsAtOnce = 64;
// What a vector may read beyond the last group's factor.
constexpr size_t kGroupsBeyond = V::kBytes / 8;

// The least power of two at or above amax / 448 of each group of 32, as E8M0 byte and as reciprocal.
template <typename Values>
uint32_t mx_scales(const uint8_t* src, size_t num_groups, uint8_t* scales, float* reciprocals) {
  uint32_t worst = 0;
  for (size_t g = 0; g < num_groups; ++g, src += kMxGroup * Values::kValueBytes) {
    const uint32_t amax = Values::largest32(src);
    worst = std::max(worst, amax);
    scales[g] = scale_mxfp8(f32_of(amax));
    reciprocals[g] = reciprocal_e8m0(scales[g]);
  }
  return worst;
}

template <typename Values>
struct MxStage {
  static constexpr int kSrcBytes = 2 * Values::kVectorBytes;
  CodeMaker codes;
  const float* reciprocal;  // of the next group

  explicit MxStage(const float* reciprocals) : codes(127), reciprocal(reciprocals) {}

  inline V::I operator()(const uint8_t* src) {
    const V::I x0 = next(src, 0);
    const V::I x1 = next(src + Values::kVectorBytes, V::kLanes16 / kMxGroup);
    reciprocal += V::kBytes / kMxGroup;
    return codes(x0, x1);
  }
  inline V::I next(const uint8_t* src, int group) const {
    const V::F factor = V::set_f(reciprocal[group]);
    return Values::template scaled<Arithmetic::kMultiply>(src, {factor, factor});
  }
};

template <typename Stage>
uint64_t stream_groups(uint8_t* dst, const uint8_t* src, size_t nbytes, uint64_t word, Stage& stage) {
  return (reinterpret_cast<uintptr_t>(dst) & 63u) == 0 ? stream_body<Store::kStream>(dst, src, nbytes, word, stage)
                                                       : stream_body<Store::kCached>(dst, src, nbytes, word, stage);
}

template <typename Values>
uint64_t mxfp8(uint8_t* dst, uint8_t* scales, const void* src_, size_t n, uint64_t first_word, uint32_t* max_bits) {
  const auto* src = static_cast<const uint8_t*>(src_);
  float reciprocals[kGroupsAtOnce + kGroupsBeyond] = {};
  uint64_t sum = 0;
  for (size_t at = 0; at < n; at += kGroupsAtOnce * kMxGroup) {
    const size_t count = std::min(kGroupsAtOnce * kMxGroup, n - at);
    const uint8_t* values = src + at * Values::kValueBytes;
    *max_bits = std::max(*max_bits, mx_scales<Values>(values, count / kMxGroup, scales + at / kMxGroup, reciprocals));
    MxStage<Values> stage(reciprocals);
    sum += stream_groups(dst + at, values, count, first_word + at / 8, stage);
  }
  return sum;
}

// e4m3 scales of the groups of 16 whose amaxes are `amax`, and what their values are divided by, 8 times each.
inline void nv_scales(const float* amax, size_t num_groups, float scale2, uint8_t* scales, float* divisors) {
  const V::F six = V::set_f(6.0f * scale2);
  for (size_t g = 0; g < num_groups; g += V::kLanes32) {
    const V::F quotient = V::div(V::load_f(amax + g), six);
    const V::I one = V::as_i(V::set_f(1.0f));
    const V::I nonzero = V::as_i(quotient);
    const V::F scale = V::as_f(V::select_lt32(V::zero(), nonzero, nonzero, one));
    const V::I code = e4m3_lanes(V::min(V::max(scale, V::set_f(0x1p-9f)), V::set_f(kE4m3Max)));
    alignas(64) uint32_t codes[V::kLanes32];
    alignas(64) float products[V::kLanes32];
    V::store(codes, code);
    V::store_f(products, V::mul(f32_of_e4m3_lanes(code), V::set_f(scale2)));
    const size_t count = std::min<size_t>(V::kLanes32, num_groups - g);
    for (size_t i = 0; i < count; ++i) {
      scales[g + i] = static_cast<uint8_t>(codes[i]);
      _mm256_storeu_ps(divisors + 8 * (g + i), _mm256_set1_ps(products[i]));
    }
  }
}

template <typename Values>
struct NvStage {
  static constexpr int kSrcBytes = 4 * Values::kVectorBytes;
  static constexpr int kGroups = V::kLanes16 / kNvGroup;  // of a vector of 16-bit lanes
  const float* divisors;                                  // of the next groups

  explicit NvStage(const float* divisors_) : divisors(divisors_) {}

  inline V::I operator()(const uint8_t* src) {
    const V::I c0 = next(src, 0);
    const V::I c1 = next(src, 1);
    const V::I c2 = next(src, 2);
    const V::I c3 = next(src, 3);
    divisors += 4 * 8 * kGroups;
    return V::nibbles(c0, c1, c2, c3);
  }
  inline V::I next(const uint8_t* src, int vector) const {
    const Factors by = Values::by_groups(divisors + 8 * kGroups * vector);
    return e2m1_lanes(Values::template scaled<Arithmetic::kDivide>(src + Values::kVectorBytes * vector, by));
  }
};

template <typename Values>
uint64_t nvfp4(uint8_t* dst, uint8_t* scales, const void* src_, size_t n, float scale2, uint64_t first_word,
               uint32_t* max_bits) {
  const auto* src = static_cast<const uint8_t*>(src_);
  float amax[kGroupsAtOnce] = {};
  float divisors[8 * (kGroupsAtOnce + kGroupsBeyond)] = {};
  uint64_t sum = 0;
  for (size_t at = 0; at < n; at += kGroupsAtOnce * kNvGroup) {
    const size_t count = std::min(kGroupsAtOnce * kNvGroup, n - at);
    const uint8_t* values = src + at * Values::kValueBytes;
    uint32_t worst = 0;
    for (size_t g = 0; g < count / kNvGroup; ++g) {
      const uint32_t bits = Values::largest16(values + g * kNvGroup * Values::kValueBytes);
      worst = std::max(worst, bits);
      amax[g] = f32_of(bits);
    }
    *max_bits = std::max(*max_bits, worst);
    nv_scales(amax, count / kNvGroup, scale2, scales + at / kNvGroup, divisors);
    NvStage<Values> stage(divisors);
    sum += stream_groups(dst + at / 2, values, count / 2, first_word + at / 16, stage);
  }
  return sum;
}

template <typename Values>
RowKernels row_kernels() {
  return {largest<Values>, scale<Values, Arithmetic::kMultiply>, scale<Values, Arithmetic::kDivide>, mxfp8<Values>,
          nvfp4<Values>};
}

}  // namespace
}  // namespace wsync
