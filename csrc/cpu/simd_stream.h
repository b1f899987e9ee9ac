// Contiguous bytes in, contiguous bytes out, digested on the way. Include after a header that defines V.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/digest.h"
#include "core/dtype.h"

namespace wsync {
namespace {

// The digest of a vector of words at a time.
struct DigestLanes {
  static inline V::I key_of(uint64_t word) { return V::add64(V::set64(digest_key(word)), V::word_keys()); }

  // The key of the vector `vectors` further on.
  static inline V::I step(uint64_t vectors) { return V::set64(V::kBytes / 8 * vectors * kDigestKey); }

  static inline V::I f(V::I words, V::I key) {
    const V::I x = V::xor_(words, key);
    return V::add64(V::mul_low32(x, V::srl64<32>(x)), x);
  }
};

inline uint64_t digest_words_of(const uint8_t* bytes, size_t nbytes, uint64_t word) {
  uint64_t sum = 0;
  for (size_t i = 0; i < nbytes; i += 8, ++word) {
    uint64_t value;
    std::memcpy(&value, bytes + i, 8);
    sum += digest_word(value, digest_key(word));
  }
  return sum;
}

inline uint32_t largest_u32_of(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// Maximum of non-negative 16-bit values (bf16 without sign), as f32 bits.
inline uint32_t largest_bf16_of(__m256i v) {
  const __m128i m = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i inverted = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(-1)));
  return static_cast<uint32_t>(static_cast<uint16_t>(~_mm_extract_epi16(inverted, 0))) << 16;
}

inline uint32_t largest_u32(V::I v) { return largest_u32_of(V::fold_max_u32(v)); }
inline uint32_t largest_bf16(V::I v) { return largest_bf16_of(V::fold_max_u16(v)); }

// The stages of stream(): what a vector of output is made of.
struct CopyStage {
  static constexpr int kSrcBytes = V::kBytes;
  V::I operator()(const uint8_t* src) { return V::load(src); }
};

// Copies that keep the largest magnitude: of 16-bit floats, of 32-bit ones, and of the upper halves of 64-bit ones.
// (Constructors are written out because implicit ones would not be compiled for this instruction set.)
struct CheckFloat16Stage {
  static constexpr int kSrcBytes = V::kBytes;
  V::I worst;
  CheckFloat16Stage() : worst(V::zero()) {}
  V::I operator()(const uint8_t* src) {
    const V::I v = V::load(src);
    worst = V::max_u16(worst, V::and_(v, V::set16(0x7fff)));
    return v;
  }
  uint32_t bits() const { return largest_bf16(worst); }
};

template <uint64_t kMask>
struct CheckWideFloatStage {
  static constexpr int kSrcBytes = V::kBytes;
  V::I worst;
  CheckWideFloatStage() : worst(V::zero()) {}
  V::I operator()(const uint8_t* src) {
    const V::I v = V::load(src);
    worst = V::max_u32(worst, V::and_(v, V::set64(kMask)));
    return v;
  }
  uint32_t bits() const { return largest_u32(worst); }
};

using CheckFloat32Stage = CheckWideFloatStage<0x7fffffff7fffffffull>;
using CheckFloat64Stage = CheckWideFloatStage<0x7fffffff00000000ull>;

// A vector of bf16 (RNE) of f32 values, and the running maximum of their magnitudes.
inline V::I round_bf16_of(const uint8_t* src, V::I* worst) {
  const V::I low = V::load(src);
  const V::I high = V::load(src + V::kBytes);
  const V::I magnitude = V::set32(0x7fffffff);
  *worst = V::max_u32(*worst, V::max_u32(V::and_(low, magnitude), V::and_(high, magnitude)));
  const V::I half = V::set32(0x7fff);
  const V::I one = V::set32(1);
  auto round = [&](V::I bits) { return V::add32(V::add32(bits, half), V::and_(V::srl32<16>(bits), one)); };
  return V::high_halves(round(low), round(high));
}

struct RoundBf16Stage {
  static constexpr int kSrcBytes = 2 * V::kBytes;
  V::I worst;
  RoundBf16Stage() : worst(V::zero()) {}
  V::I operator()(const uint8_t* src) { return round_bf16_of(src, &worst); }
  uint32_t bits() const { return largest_u32(worst); }
};

// Long aligned runs are stored around the caches, since nobody reads them soon.
enum class Store { kNone, kCached, kStream };

template <Store kStore>
inline void store_vector(uint8_t* dst, V::I v) {
  if constexpr (kStore == Store::kStream) {
    V::stream(dst, v);
  } else if constexpr (kStore == Store::kCached) {
    V::store(dst, v);
  }
}

// Source bytes for nbytes of output.
template <typename Stage>
constexpr size_t source_of(size_t nbytes) {
  return nbytes * static_cast<size_t>(Stage::kSrcBytes) / V::kBytes;
}

// Less than a vector of output through padded buffers. What a stage makes of the padding is not looked at.
template <Store kStore, typename Stage>
uint64_t stream_rest(uint8_t* dst, const uint8_t* src, size_t nbytes, uint64_t word, Stage& stage) {
  alignas(64) uint8_t in[Stage::kSrcBytes] = {};
  alignas(64) uint8_t out[V::kBytes];
  std::memcpy(in, src, source_of<Stage>(nbytes));
  V::store(out, stage(in));
  std::memset(out + nbytes, 0, V::kBytes - nbytes);
  if constexpr (kStore != Store::kNone) std::memcpy(dst, out, nbytes);
  return digest_words_of(out, nbytes, word);
}

// The stage is called for vector after vector, in order.
template <Store kStore, typename Stage>
uint64_t stream_body(uint8_t* dst, const uint8_t* src, size_t nbytes, uint64_t word, Stage& stage) {
  constexpr size_t kStep = V::kBytes;
  V::I key0 = DigestLanes::key_of(word);
  V::I key1 = V::add64(key0, DigestLanes::step(1));
  const V::I step = DigestLanes::step(2);
  V::I sum0 = V::zero();
  V::I sum1 = V::zero();
  size_t i = 0;
  for (; i + 2 * kStep <= nbytes; i += 2 * kStep) {
    const V::I v0 = stage(src + source_of<Stage>(i));
    const V::I v1 = stage(src + source_of<Stage>(i + kStep));
    store_vector<kStore>(dst + i, v0);
    store_vector<kStore>(dst + i + kStep, v1);
    sum0 = V::add64(sum0, DigestLanes::f(v0, key0));
    sum1 = V::add64(sum1, DigestLanes::f(v1, key1));
    key0 = V::add64(key0, step);
    key1 = V::add64(key1, step);
  }
  if (i + kStep <= nbytes) {
    const V::I v = stage(src + source_of<Stage>(i));
    store_vector<kStore>(dst + i, v);
    sum0 = V::add64(sum0, DigestLanes::f(v, key0));
    i += kStep;
  }
  uint64_t sum = V::sum64(V::add64(sum0, sum1));
  constexpr Store kRest = kStore == Store::kStream ? Store::kCached : kStore;
  if (i < nbytes) sum += stream_rest<kRest>(dst + i, src + source_of<Stage>(i), nbytes - i, word + i / 8, stage);
  return sum;
}

// nbytes of output, digested from `word` on.
template <typename Stage>
uint64_t stream(void* dst_, const void* src_, size_t nbytes, uint64_t word, Stage& stage) {
  auto* dst = static_cast<uint8_t*>(dst_);
  const auto* src = static_cast<const uint8_t*>(src_);
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(dst) & 63u;
  if (nbytes < 256 || (misaligned & 7u) != 0) return stream_body<Store::kCached>(dst, src, nbytes, word, stage);
  uint64_t sum = 0;
  if (misaligned != 0) {  // up to a cache line's beginning, in whole words
    const size_t head = 64 - misaligned;
    sum = stream_body<Store::kCached>(dst, src, head, word, stage);
    dst += head;
    src += source_of<Stage>(head);
    word += head / 8;
    nbytes -= head;
  }
  return sum + stream_body<Store::kStream>(dst, src, nbytes, word, stage);
}

inline uint64_t digest(const void* src, size_t nbytes, uint64_t first_word) {
  CopyStage stage;
  return stream_body<Store::kNone>(nullptr, static_cast<const uint8_t*>(src), nbytes, first_word, stage);
}

inline uint64_t copy(void* dst, const void* src, size_t nbytes, uint64_t first_word) {
  CopyStage stage;
  return stream(dst, src, nbytes, first_word, stage);
}

// n values of kOutBytes each on the wire.
template <typename Stage, size_t kOutBytes>
uint64_t checked(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits) {
  Stage stage;
  const uint64_t sum = stream(dst, src, kOutBytes * n, first_word, stage);
  *max_bits = std::max(*max_bits, stage.bits());
  return sum;
}

}  // namespace
}  // namespace wsync
