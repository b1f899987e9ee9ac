// Tiles of 128 x 128 scale blocks: loading with amax, and quantising. Include after simd_stream.h and simd_codes.h.
#pragma once

#include <new>

#include "core/descriptors.h"
#include "cpu/kernels.h"

namespace wsync {
namespace {

// The loaders: a vector of 16-bit lanes' worth of values at a time.
struct Bf16Loader {
  using Src = uint16_t;
  using Tile = uint16_t;
  static inline void load(Tile* tile, const uint8_t* src, V::I* worst) {
    const V::I v = V::load(src);
    *worst = V::max_u16(*worst, V::and_(v, V::set16(0x7fff)));
    if (tile != nullptr) V::store(tile, v);
  }
  static inline uint32_t bits(V::I worst) { return largest_bf16(worst); }
};

struct F32RoundLoader {
  using Src = float;
  using Tile = uint16_t;
  static inline void load(Tile* tile, const uint8_t* src, V::I* worst) {
    const V::I v = round_bf16_of(src, worst);
    if (tile != nullptr) V::store(tile, v);
  }
  static inline uint32_t bits(V::I worst) { return largest_u32(worst); }
};

struct F32Loader {
  using Src = float;
  using Tile = float;
  static inline void load(Tile* tile, const uint8_t* src, V::I* worst) {
    const V::I low = V::load(src);
    const V::I high = V::load(src + V::kBytes);
    const V::I magnitude = V::set32(0x7fffffff);
    *worst = V::max_u32(*worst, V::max_u32(V::and_(low, magnitude), V::and_(high, magnitude)));
    if (tile != nullptr) {
      V::store(tile, low);
      V::store(tile + V::kLanes32, high);
    }
  }
  static inline uint32_t bits(V::I worst) { return largest_u32(worst); }
};

// n values; the last ones through a padded buffer.
template <typename Loader, bool kStoreTile>
inline V::I load_run(typename Loader::Tile* tile, const uint8_t* src, int n, V::I worst) {
  using Src = typename Loader::Src;
  using Tile = typename Loader::Tile;
  int c = 0;
  for (; c + V::kLanes16 <= n; c += V::kLanes16) {
    Loader::load(kStoreTile ? tile + c : nullptr, src + sizeof(Src) * static_cast<size_t>(c), &worst);
  }
  if (const int rest = n - c; rest > 0) {
    alignas(64) uint8_t in[V::kLanes16 * sizeof(Src)] = {};
    alignas(64) Tile out[V::kLanes16];
    std::memcpy(in, src + sizeof(Src) * static_cast<size_t>(c), sizeof(Src) * static_cast<size_t>(rest));
    Loader::load(out, in, &worst);
    if (kStoreTile) std::memcpy(tile + c, out, sizeof(Tile) * static_cast<size_t>(rest));
  }
  return worst;
}

template <typename Loader, bool kStoreTile>
void load_tile(typename Loader::Tile* tile, const uint8_t* src, size_t row_bytes, int rows, const TileCols& cols,
               uint32_t* max_bits) {
  using Src = typename Loader::Src;
  V::I worst[kTileBlocks];
  for (V::I& w : worst) w = V::zero();
  for (int r = 0; r < rows; ++r, src += row_bytes) {
    auto* row = kStoreTile ? tile + static_cast<ptrdiff_t>(r) * kTileCols : nullptr;
    for (int b = 0; b < cols.num_blocks; ++b) {
      const int begin = cols.begin[b];
      worst[b] = load_run<Loader, kStoreTile>(kStoreTile ? row + begin : nullptr,
                                              src + sizeof(Src) * static_cast<size_t>(begin), cols.begin[b + 1] - begin,
                                              worst[b]);
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

// bf16 times a power of two: exact, so that the bits go straight to the codec.
struct Pow2Quantiser {
  using Tile = uint16_t;
  CodeMaker codes;

  explicit Pow2Quantiser(float scale) : codes(bits_of(scale) >> 23) {}

  inline V::I operator()(const uint16_t* tile) const { return codes(V::load(tile), V::load(tile + V::kLanes16)); }
};

// bf16 times any f32.
struct Bf16Quantiser {
  using Tile = uint16_t;
  CodeMaker codes;
  V::F inv;

  explicit Bf16Quantiser(float scale) : codes(127), inv(V::set_f(1.0f / scale)) {}

  inline V::I scaled(V::I x) const {
    const V::I even = V::as_i(V::mul(V::as_f(V::even_high(x)), inv));
    const V::I odd = V::as_i(V::mul(V::as_f(V::odd_high(x)), inv));
    return V::interleave_high(V::sticky(even), V::sticky(odd));
  }

  inline V::I operator()(const uint16_t* tile) const {
    return codes(scaled(V::load(tile)), scaled(V::load(tile + V::kLanes16)));
  }
};

// f32 as given times any f32. Saturates, and so serves the rare tiles that the others do not.
struct F32Quantiser {
  using Tile = float;
  V::F inv;

  explicit F32Quantiser(float scale) : inv(V::set_f(1.0f / scale)) {}

  inline V::I lanes(const float* tile) const { return e4m3_lanes(V::mul(V::load_f(tile), inv)); }

  inline V::I operator()(const float* tile) const {
    return V::bytes(lanes(tile), lanes(tile + V::kLanes32), lanes(tile + 2 * V::kLanes32),
                    lanes(tile + 3 * V::kLanes32));
  }
};

// Less than a vector at the end of a row of a block, through padded buffers.
template <typename Quantiser>
uint64_t quantise_rest(const Quantiser& quantiser, const typename Quantiser::Tile* tile, int n, uint8_t* dst,
                       uint64_t word, bool counted) {
  typename Quantiser::Tile in[V::kBytes] = {};
  alignas(64) uint8_t out[V::kBytes];
  const auto nbytes = static_cast<size_t>(n);
  std::memcpy(in, tile, sizeof(in[0]) * nbytes);
  V::store(out, quantiser(in));
  std::memset(out + nbytes, 0, V::kBytes - nbytes);
  std::memcpy(dst, out, nbytes);
  return counted ? digest_words_of(out, nbytes, word) : 0;
}

// One row whose blocks are all 128 wide: no rests, and the keys run on from block to block.
template <typename Quantiser, Store kStore>
inline V::I quantise_whole_row(const typename Quantiser::Tile* tile, int num_blocks, const Quantiser* quantisers,
                               uint8_t* dst, uint64_t word, const uint8_t* ahead, int ahead_block_bytes, V::I sums) {
  const V::I step = DigestLanes::step(1);
  V::I key = DigestLanes::key_of(word);
  for (int b = 0; b < num_blocks; ++b, tile += kScaleBlock, dst += kScaleBlock) {
    const Quantiser& quantiser = quantisers[b];
    for (int i = 0; i < ahead_block_bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
    ahead += ahead_block_bytes;
#pragma GCC unroll 4
    for (int c = 0; c < kScaleBlock; c += V::kBytes) {
      const V::I q = quantiser(tile + c);
      store_vector<kStore>(dst + c, q);
      sums = V::add64(sums, DigestLanes::f(q, key));
      key = V::add64(key, step);
    }
  }
  return sums;
}

template <typename Quantiser, Store kStore>
uint64_t quantise_rows(const typename Quantiser::Tile* tile, int rows, const TileCols& cols,
                       const Quantiser* quantisers, const TileSink& sink) {
  const int num_blocks = cols.num_blocks;
  const bool whole = cols.cols() == num_blocks * kScaleBlock;
  const V::I step = DigestLanes::step(1);
  V::I sums = V::zero();
  uint64_t sum = 0;
  uint8_t* dst = sink.dst;
  uint64_t row_word = sink.first_word;
  for (int r = 0; r < rows; ++r, tile += kTileCols, dst += sink.dst_stride, row_word += sink.words_per_row) {
    if (whole) {
      sums = quantise_whole_row<Quantiser, kStore>(tile, num_blocks, quantisers, dst, row_word,
                                                   sink.ahead + r * sink.ahead_stride, sink.ahead_block_bytes, sums);
      continue;
    }
    for (int b = 0; b < num_blocks; ++b) {
      const Quantiser& quantiser = quantisers[b];
      int c = cols.begin[b];
      V::I key = DigestLanes::key_of(row_word + static_cast<uint64_t>(c) / 8);
      for (; c + V::kBytes <= cols.begin[b + 1]; c += V::kBytes) {
        const V::I q = quantiser(tile + c);
        store_vector<kStore>(dst + c, q);
        sums = V::add64(sums, DigestLanes::f(q, key));
        key = V::add64(key, step);
      }
      if (const int rest = cols.begin[b + 1] - c; rest > 0) {
        sum += quantise_rest(quantiser, tile + c, rest, dst + c, row_word + static_cast<uint64_t>(c) / 8, sink.counted);
      }
    }
  }
  return sink.counted ? sum + V::sum64(sums) : 0;
}

template <typename Quantiser>
uint64_t quantise_tile(const typename Quantiser::Tile* tile, int rows, const TileCols& cols, const float* scale,
                       const TileSink& sink) {
  alignas(64) uint8_t storage[kTileBlocks * sizeof(Quantiser)];
  auto* quantisers = reinterpret_cast<Quantiser*>(storage);
  // Non-temporal stores pay off where they fill whole cache lines.
  bool whole_lines = (reinterpret_cast<uintptr_t>(sink.dst) & 63u) == 0 && sink.dst_stride % 64 == 0;
  for (int b = 0; b < cols.num_blocks; ++b) {
    new (quantisers + b) Quantiser(scale[b]);
    whole_lines = whole_lines && cols.begin[b] % 64 == 0;
  }
  return whole_lines ? quantise_rows<Quantiser, Store::kStream>(tile, rows, cols, quantisers, sink)
                     : quantise_rows<Quantiser, Store::kCached>(tile, rows, cols, quantisers, sink);
}

}  // namespace
}  // namespace wsync
