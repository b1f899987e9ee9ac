// The inner loops, once for each instruction set. Everything above them is plain C++ and the same for all sets; a
// scalar twin gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace wsync {

// Columns of a tile are cut into at most this many scale blocks; a tile of bf16 (256 KiB) stays in the L2 cache.
constexpr int kTileBlocks = 8;
constexpr int kTileRows = 128;
constexpr int kTileCols = kTileBlocks * 128;
// Values that share a scale in mxfp8 and in nvfp4.
constexpr int kMxGroup = 32;
constexpr int kNvGroup = 16;

// The columns of a tile: block b holds columns [begin[b], begin[b + 1]).
struct TileCols {
  int num_blocks;
  int begin[kTileBlocks + 1];
  int cols() const { return begin[num_blocks]; }
};

// Where a tile's quantised rows go and how they are counted. With `counted`, every row and block starts on an 8-byte
// word and `first_word` is the key index of the tile's first word.
struct TileSink {
  uint8_t* dst;
  int64_t dst_stride;  // bytes
  uint64_t first_word;
  uint64_t words_per_row;
  bool counted;
  // The source of the tile that comes next, fetched into the L2 cache meanwhile: the memory would idle otherwise.
  const uint8_t* ahead;
  int64_t ahead_stride;   // bytes
  int ahead_block_bytes;  // of one row of one block; 0: nothing to fetch
};

// Recipes whose scale blocks lie in a row. All take n contiguous values of one kind, write their codes to dst, return
// the digest of the codes from first_word on (a last partial word padded with zeros), and raise *max_bits to the f32
// bits of the largest |value|. What they write when a value is not finite is unspecified.
struct RowKernels {
  // f32 bits of the largest |value|.
  uint32_t (*largest)(const void* src, size_t n);
  // rne_e4m3(value * factor) and rne_e4m3(value / divisor), saturating at 448.
  uint64_t (*multiply)(uint8_t* dst, const void* src, size_t n, float factor, uint64_t first_word, uint32_t* max_bits);
  uint64_t (*divide)(uint8_t* dst, const void* src, size_t n, float divisor, uint64_t first_word, uint32_t* max_bits);
  // n is a multiple of 32; one E8M0 byte for each 32 values goes to scales.
  uint64_t (*mxfp8)(uint8_t* dst, uint8_t* scales, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits);
  // n is a multiple of 16; two e2m1 codes a byte; one e4m3 byte for each 16 values goes to scales.
  uint64_t (*nvfp4)(uint8_t* dst, uint8_t* scales, const void* src, size_t n, float scale2, uint64_t first_word,
                    uint32_t* max_bits);
};

struct Kernels {
  // Contiguous bytes. The digest counts from first_word and pads a last partial word with zeros.
  uint64_t (*digest)(const void* src, size_t nbytes, uint64_t first_word);
  uint64_t (*copy)(void* dst, const void* src, size_t nbytes, uint64_t first_word);

  // Copies of n floats of 16, 32 and 64 bits; *max_bits becomes the maximum of itself and the upper 32 bits of every
  // |value|, those of 16 bits shifted up.
  uint64_t (*copy_float16)(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits);
  uint64_t (*copy_float32)(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits);
  uint64_t (*copy_float64)(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits);

  // n f32 values to bf16 with digest; *max_bits as above.
  uint64_t (*round_bf16)(void* dst, const void* src, size_t n, uint64_t first_word, uint32_t* max_bits);

  // Pass 1 of quantising: rows of contiguous values into a tile of kTileCols per row, and for each block the f32 bits
  // of the largest |value| (max_bits[b], overwritten). A null tile only takes the maximum. row_stride in elements.
  void (*load_bf16)(uint16_t* tile, const uint16_t* src, int64_t row_stride, int rows, const TileCols&,
                    uint32_t* max_bits);
  void (*load_f32_round)(uint16_t* tile, const float* src, int64_t row_stride, int rows, const TileCols&,
                         uint32_t* max_bits);
  void (*load_f32)(float* tile, const float* src, int64_t row_stride, int rows, const TileCols&, uint32_t* max_bits);

  // Pass 2: q = rne_e4m3(value * (1 / scale[b])), the reciprocal in f32. quantise_f32 takes anything and saturates at
  // 448; the other two work in 16-bit integers and need |value| * (1 / scale[b]) <= 448 (1 + 2^-20), and quantise_pow2
  // needs powers of two with exponent bits in [kPow2MinExponent, kPow2MaxExponent].
  uint64_t (*quantise_pow2)(const uint16_t* tile, int rows, const TileCols&, const float* scale, const TileSink&);
  uint64_t (*quantise_bf16)(const uint16_t* tile, int rows, const TileCols&, const float* scale, const TileSink&);
  uint64_t (*quantise_f32)(const float* tile, int rows, const TileCols&, const float* scale, const TileSink&);

  // Of bf16 and of f32 values.
  RowKernels rows[2];

  // n codes times a scale, one rounding: of e4m3, and of e2m1, two a byte (the first at the low end; n is even).
  void (*decode_e4m3)(float* out, const uint8_t* codes, size_t n, float scale);
  void (*decode_e2m1)(float* out, const uint8_t* codes, size_t n, float scale);

  // Orders non-temporal stores before whatever tells another thread or process that the bytes are there.
  void (*fence)();
};

constexpr uint32_t kPow2MinExponent = 16;
constexpr uint32_t kPow2MaxExponent = 254;

const Kernels& kernels_for(Isa isa);

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace wsync
