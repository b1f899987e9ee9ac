// AVX2. Loads may be unaligned; long aligned rows are stored around the caches, since nobody reads them soon.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "core/digest.h"
#include "core/dtype.h"
#include "cpu/kernels.h"
#include "cpu/rows_scalar.h"

// Only the functions of this file may use AVX2: a flag for the whole file would leak into inline functions that other
// files share.
#pragma GCC push_options
#pragma GCC target("avx2")

#include "cpu/avx2_digest.h"
#include "cpu/avx2_quantise.h"

namespace wsync {
namespace {

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline uint32_t max_epu32_of(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// Maximum of 16 non-negative 16-bit values (bf16 without sign), as f32 bits.
inline uint32_t max_bf16_of(__m256i v) {
  const __m128i m = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i inverted = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(-1)));
  return static_cast<uint32_t>(static_cast<uint16_t>(~_mm_extract_epi16(inverted, 0))) << 16;
}

// bf16 (RNE) of 16 f32 values, and the running maximum of their magnitudes.
inline __m256i round16(const void* src, __m256i* worst) {
  const __m256i low = load32(src);
  const __m256i high = load32(static_cast<const uint8_t*>(src) + 32);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  *worst =
      _mm256_max_epu32(*worst, _mm256_max_epu32(_mm256_and_si256(low, magnitude), _mm256_and_si256(high, magnitude)));
  const __m256i half = _mm256_set1_epi32(0x7fff);
  const __m256i one = _mm256_set1_epi32(1);
  auto round8 = [&](__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, half), odd), 16);
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(round8(low), round8(high)), 0xd8);
}

// The stages of stream(): what 32 bytes of output are made of. Zeros must give zeros.
struct CopyStage {
  static constexpr int kSrcBytes = 32;
  __m256i operator()(const uint8_t* src) { return load32(src); }
};

// Copies that keep the largest magnitude: of 16-bit floats, of 32-bit ones, and of the upper halves of 64-bit ones.
struct CheckFloat16Stage {
  static constexpr int kSrcBytes = 32;
  __m256i worst;
  CheckFloat16Stage() : worst(_mm256_setzero_si256()) {}  // an implicit one would not be compiled for AVX2
  __m256i operator()(const uint8_t* src) {
    const __m256i v = load32(src);
    worst = _mm256_max_epu16(worst, _mm256_and_si256(v, _mm256_set1_epi16(0x7fff)));
    return v;
  }
  uint32_t bits() const { return max_bf16_of(worst); }
};

template <uint64_t kMask>
struct CheckWideFloatStage {
  static constexpr int kSrcBytes = 32;
  __m256i worst;
  CheckWideFloatStage() : worst(_mm256_setzero_si256()) {}  // an implicit one would not be compiled for AVX2
  __m256i operator()(const uint8_t* src) {
    const __m256i v = load32(src);
    worst = _mm256_max_epu32(worst, _mm256_and_si256(v, _mm256_set1_epi64x(static_cast<int64_t>(kMask))));
    return v;
  }
  uint32_t bits() const { return max_epu32_of(worst); }
};

using CheckFloat32Stage = CheckWideFloatStage<0x7fffffff7fffffffull>;
using CheckFloat64Stage = CheckWideFloatStage<0x7fffffff00000000ull>;

struct RoundBf16Stage {
  static constexpr int kSrcBytes = 64;
  __m256i worst;
  RoundBf16Stage() : worst(_mm256_setzero_si256()) {}  // an implicit one would not be compiled for AVX2
  __m256i operator()(const uint8_t* src) { return round16(src, &worst); }
  uint32_t bits() const { return max_epu32_of(worst); }
};

enum class Store { kNone, kCached, kStream };

template <Store kStore>
inline void store32(uint8_t* dst, __m256i v) {
  if constexpr (kStore == Store::kStream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), v);
  } else if constexpr (kStore == Store::kCached) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), v);
  }
}

// Up to 32 bytes of output through a padded buffer.
template <Store kStore, typename Stage>
uint64_t stream_rest(uint8_t* dst, const uint8_t* src, size_t nbytes, uint64_t word, Stage& stage) {
  constexpr size_t kRatio = Stage::kSrcBytes / 32;
  alignas(32) uint8_t in[Stage::kSrcBytes] = {};
  alignas(32) uint8_t out[32];
  std::memcpy(in, src, nbytes * kRatio);
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), stage(in));
  if constexpr (kStore != Store::kNone) std::memcpy(dst, out, nbytes);
  uint64_t sum = 0;
  for (size_t i = 0; i < nbytes; i += 8, ++word) {
    uint64_t value;
    std::memcpy(&value, out + i, 8);
    sum += digest_word(value, digest_key(word));
  }
  return sum;
}

template <Store kStore, typename Stage>
uint64_t stream_body(uint8_t* dst, const uint8_t* src, size_t nbytes, uint64_t word, Stage& stage) {
  constexpr size_t kRatio = Stage::kSrcBytes / 32;
  __m256i key0 = DigestLanes::key_of(word);
  __m256i key1 = _mm256_add_epi64(key0, DigestLanes::step(1));
  const __m256i step = DigestLanes::step(2);
  __m256i sum0 = _mm256_setzero_si256();
  __m256i sum1 = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 64 <= nbytes; i += 64) {
    const __m256i v0 = stage(src + i * kRatio);
    const __m256i v1 = stage(src + (i + 32) * kRatio);
    store32<kStore>(dst + i, v0);
    store32<kStore>(dst + i + 32, v1);
    sum0 = _mm256_add_epi64(sum0, DigestLanes::f(v0, key0));
    sum1 = _mm256_add_epi64(sum1, DigestLanes::f(v1, key1));
    key0 = _mm256_add_epi64(key0, step);
    key1 = _mm256_add_epi64(key1, step);
  }
  uint64_t sum = DigestLanes::total(_mm256_add_epi64(sum0, sum1));
  constexpr Store kRest = kStore == Store::kStream ? Store::kCached : kStore;
  for (size_t n; i < nbytes; i += n) {
    n = std::min<size_t>(32, nbytes - i);
    sum += stream_rest<kRest>(dst + i, src + i * kRatio, n, word + i / 8, stage);
  }
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
    src += head * (Stage::kSrcBytes / 32);
    word += head / 8;
    nbytes -= head;
  }
  return sum + stream_body<Store::kStream>(dst, src, nbytes, word, stage);
}

uint64_t digest(const void* src, size_t nbytes, uint64_t first_word) {
  CopyStage stage;
  return stream_body<Store::kNone>(nullptr, static_cast<const uint8_t*>(src), nbytes, first_word, stage);
}

uint64_t copy(void* dst, const void* src, size_t nbytes, uint64_t first_word) {
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

// The loaders of tiles: 16 values at a time, and the rest of a block through a padded buffer.
struct Bf16Loader {
  using Src = uint16_t;
  using Tile = uint16_t;
  static inline void load(Tile* tile, const uint8_t* src, __m256i* worst) {
    const __m256i v = load32(src);
    *worst = _mm256_max_epu16(*worst, _mm256_and_si256(v, _mm256_set1_epi16(0x7fff)));
    if (tile != nullptr) _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile), v);
  }
  static uint32_t bits(__m256i worst) { return max_bf16_of(worst); }
};

struct F32RoundLoader {
  using Src = float;
  using Tile = uint16_t;
  static inline void load(Tile* tile, const uint8_t* src, __m256i* worst) {
    const __m256i v = round16(src, worst);
    if (tile != nullptr) _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile), v);
  }
  static uint32_t bits(__m256i worst) { return max_epu32_of(worst); }
};

struct F32Loader {
  using Src = float;
  using Tile = float;
  static inline void load(Tile* tile, const uint8_t* src, __m256i* worst) {
    const __m256i low = load32(src);
    const __m256i high = load32(src + 32);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    *worst = _mm256_max_epu32(*worst, _mm256_and_si256(low, magnitude));
    *worst = _mm256_max_epu32(*worst, _mm256_and_si256(high, magnitude));
    if (tile != nullptr) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile + 8), high);
    }
  }
  static uint32_t bits(__m256i worst) { return max_epu32_of(worst); }
};

template <typename Loader, bool kStoreTile>
void load_tile(typename Loader::Tile* tile, const uint8_t* src, size_t row_bytes, int rows, const TileCols& cols,
               uint32_t* max_bits) {
  using Src = typename Loader::Src;
  using Tile = typename Loader::Tile;
  __m256i worst[kTileBlocks];
  for (__m256i& w : worst) w = _mm256_setzero_si256();
  for (int r = 0; r < rows; ++r, src += row_bytes) {
    Tile* row = kStoreTile ? tile + static_cast<ptrdiff_t>(r) * kTileCols : nullptr;
    for (int b = 0; b < cols.num_blocks; ++b) {
      __m256i w = worst[b];
      int c = cols.begin[b];
      for (; c + 16 <= cols.begin[b + 1]; c += 16) {
        Loader::load(kStoreTile ? row + c : nullptr, src + sizeof(Src) * static_cast<size_t>(c), &w);
      }
      if (const int rest = cols.begin[b + 1] - c; rest > 0) {
        alignas(32) uint8_t in[16 * sizeof(Src)] = {};
        alignas(32) Tile out[16];
        std::memcpy(in, src + sizeof(Src) * static_cast<size_t>(c), sizeof(Src) * static_cast<size_t>(rest));
        Loader::load(out, in, &w);
        if (kStoreTile) std::memcpy(row + c, out, sizeof(Tile) * static_cast<size_t>(rest));
      }
      worst[b] = w;
    }
  }
  for (int b = 0; b < cols.num_blocks; ++b) max_bits[b] = Loader::bits(worst[b]);
}

template <typename Loader>
void load(typename Loader::Tile* tile, const typename Loader::Src* src, int64_t row_stride, int rows,
          const TileCols& cols, uint32_t* max_bits) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(src);
  const size_t row_bytes = static_cast<size_t>(row_stride) * sizeof(typename Loader::Src);
  if (tile == nullptr) {
    load_tile<Loader, false>(tile, bytes, row_bytes, rows, cols, max_bits);
  } else {
    load_tile<Loader, true>(tile, bytes, row_bytes, rows, cols, max_bits);
  }
}

void fence() { _mm_sfence(); }

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels table = {digest,
                                copy,
                                checked<CheckFloat16Stage, 2>,
                                checked<CheckFloat32Stage, 4>,
                                checked<CheckFloat64Stage, 8>,
                                checked<RoundBf16Stage, 2>,
                                load<Bf16Loader>,
                                load<F32RoundLoader>,
                                load<F32Loader>,
                                quantise_tile<Pow2Quantiser>,
                                quantise_tile<Bf16Quantiser>,
                                quantise_tile<F32Quantiser>,
                                {scalar_bf16_rows(), scalar_f32_rows()},
                                fence};
  return table;
}

}  // namespace wsync

#pragma GCC pop_options
#endif
