// The scalar twin: plain loops, the definition that the vector kernels must equal bit for bit.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/digest.h"
#include "core/dtype.h"
#include "cpu/kernels.h"
#include "cpu/rows_scalar.h"

namespace wsync {
namespace {

uint64_t digest(const void* src, size_t nbytes, uint64_t first_word) {
  const auto* bytes = static_cast<const uint8_t*>(src);
  uint64_t sum = 0;
  uint64_t key = digest_key(first_word);
  size_t i = 0;
  for (; i + 8 <= nbytes; i += 8, key += kDigestKey) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    sum += digest_word(word, key);
  }
  if (i < nbytes) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, nbytes - i);
    sum += digest_word(word, key);
  }
  return sum;
}

uint64_t copy(void* dst, const void* src, size_t nbytes, uint64_t first_word) {
  std::memcpy(dst, src, nbytes);
  return digest(src, nbytes, first_word);
}

// Upper 32 bits of |value|, for floats of 16, 32 and 64 bits.
uint32_t upper_bits(uint16_t bits) { return static_cast<uint32_t>(bits & 0x7fffu) << 16; }
uint32_t upper_bits(uint32_t bits) { return bits & 0x7fffffffu; }
uint32_t upper_bits(uint64_t bits) { return static_cast<uint32_t>(bits >> 32) & 0x7fffffffu; }

template <typename Bits>
uint64_t copy_floats(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits) {
  const auto* bytes = static_cast<const uint8_t*>(src);
  uint32_t worst = *max_bits;
  for (size_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + sizeof(Bits) * i, sizeof(Bits));
    worst = std::max(worst, upper_bits(bits));
  }
  *max_bits = worst;
  return copy(dst, src, sizeof(Bits) * n, first_word);
}

uint64_t round_bf16(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits) {
  const auto* in = static_cast<const uint8_t*>(src);
  auto* out = static_cast<uint8_t*>(dst);
  uint32_t worst = *max_bits;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, in + 4 * i, 4);
    worst = std::max(worst, bits & 0x7fffffffu);
    const uint16_t rounded = bf16_of_f32_bits(bits);
    std::memcpy(out + 2 * i, &rounded, 2);
  }
  *max_bits = worst;
  return digest(dst, 2 * n, first_word);
}

// Loads a tile with `convert` (source value -> tile value) and `magnitude` (source value -> f32 bits of |value|).
template <typename Tile, typename Src, typename Convert, typename Magnitude>
void load(Tile* tile, const Src* src, int64_t row_stride, int rows, const TileCols& cols, uint32_t* max_bits,
          Convert convert, Magnitude magnitude) {
  std::fill(max_bits, max_bits + cols.num_blocks, 0u);
  for (int r = 0; r < rows; ++r, src += row_stride) {
    for (int b = 0; b < cols.num_blocks; ++b) {
      for (int c = cols.begin[b]; c < cols.begin[b + 1]; ++c) {
        Src value;  // the source may be unaligned
        std::memcpy(&value, reinterpret_cast<const uint8_t*>(src) + sizeof(Src) * static_cast<size_t>(c), sizeof(Src));
        max_bits[b] = std::max(max_bits[b], magnitude(value));
        if (tile != nullptr) tile[static_cast<ptrdiff_t>(r) * kTileCols + c] = convert(value);
      }
    }
  }
}

uint32_t f32_magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

void load_bf16(uint16_t* tile, const uint16_t* src, int64_t row_stride, int rows, const TileCols& cols,
               uint32_t* max_bits) {
  load(
      tile, src, row_stride, rows, cols, max_bits, [](uint16_t v) { return v; },
      [](uint16_t v) { return static_cast<uint32_t>(v & 0x7fffu) << 16; });
}

void load_f32_round(uint16_t* tile, const float* src, int64_t row_stride, int rows, const TileCols& cols,
                    uint32_t* max_bits) {
  load(
      tile, src, row_stride, rows, cols, max_bits, [](float v) { return bf16_of_f32_bits(bits_of(v)); }, f32_magnitude);
}

void load_f32(float* tile, const float* src, int64_t row_stride, int rows, const TileCols& cols, uint32_t* max_bits) {
  load(tile, src, row_stride, rows, cols, max_bits, [](float v) { return v; }, f32_magnitude);
}

template <typename Tile, typename ToF32>
uint64_t quantise(const Tile* tile, int rows, const TileCols& cols, const float* scale, const TileSink& sink,
                  ToF32 to_f32) {
  uint64_t sum = 0;
  for (int r = 0; r < rows; ++r, tile += kTileCols) {
    uint8_t* dst = sink.dst + r * sink.dst_stride;
    for (int b = 0; b < cols.num_blocks; ++b) {
      const float inv = 1.0f / scale[b];
      for (int c = cols.begin[b]; c < cols.begin[b + 1]; ++c) dst[c] = e4m3_of_f32(to_f32(tile[c]) * inv);
    }
    if (sink.counted) {
      sum += digest(dst, static_cast<size_t>(cols.cols()),
                    sink.first_word + static_cast<uint64_t>(r) * sink.words_per_row);
    }
  }
  return sum;
}

uint64_t quantise_bf16(const uint16_t* tile, int rows, const TileCols& cols, const float* scale, const TileSink& sink) {
  return quantise(tile, rows, cols, scale, sink, f32_of_bf16);
}

uint64_t quantise_f32(const float* tile, int rows, const TileCols& cols, const float* scale, const TileSink& sink) {
  return quantise(tile, rows, cols, scale, sink, [](float v) { return v; });
}

void decode_e4m3(float* out, const uint8_t* codes, size_t n, float scale) {
  for (size_t i = 0; i < n; ++i) out[i] = f32_of_e4m3(codes[i]) * scale;
}

void decode_e2m1(float* out, const uint8_t* codes, size_t n, float scale) {
  for (size_t i = 0; i < n; i += 2) {
    out[i] = f32_of_e2m1(codes[i / 2] & 15u) * scale;
    out[i + 1] = f32_of_e2m1(codes[i / 2] >> 4) * scale;
  }
}

void fence() { std::atomic_thread_fence(std::memory_order_release); }

}  // namespace

const Kernels& scalar_kernels() {
  // A power of two needs no rule of its own here: multiplying by it is exact.
  static const Kernels table = {digest,
                                copy,
                                copy_floats<uint16_t>,
                                copy_floats<uint32_t>,
                                copy_floats<uint64_t>,
                                round_bf16,
                                load_bf16,
                                load_f32_round,
                                load_f32,
                                quantise_bf16,
                                quantise_bf16,
                                quantise_f32,
                                {scalar_bf16_rows(), scalar_f32_rows()},
                                decode_e4m3,
                                decode_e2m1,
                                fence};
  return table;
}

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512_kernels();
  if (isa == Isa::kAvx2) return avx2_kernels();
#endif
  (void)isa;
  return scalar_kernels();
}

}  // namespace wsync
