#include <algorithm>

#include "core/dtype.h"
#include "cpu/pack_parts.h"

namespace wsync {
namespace {

float* scales_of(const PackDesc& d, int64_t block_row, int64_t block_col) {
  return reinterpret_cast<float*>(d.scales) + block_row * d.scale_stride + block_col;
}

// Scales of the tile's blocks: read from the table, or made from the amax and written to it.
void tile_scales(const PackDesc& d, const Tile& tile, float* table, float* scale) {
  for (int b = 0; b < tile.cols.num_blocks; ++b) {
    const float largest = f32_of(tile.max_bits[b]);
    if (d.op == kOpFp8Block128) table[b] = scale_pow2(largest);
    if (d.op == kOpFp8Block128F32) table[b] = scale_f32(largest);
    scale[b] = table[b];
  }
}

// Whether no value of the tile saturates: always so for scales made from its amax, but a table may hold anything.
bool in_range(const Tile& tile, const float* scale) {
  constexpr float kCeiling = kE4m3Max * (1.0f + 0x1p-20f);
  for (int b = 0; b < tile.cols.num_blocks; ++b) {
    if (!(f32_of(tile.max_bits[b]) * (1.0f / scale[b]) <= kCeiling)) return false;
  }
  return true;
}

bool powers_of_two(int n, const float* scale) {
  return std::all_of(scale, scale + n, [](float s) {
    const uint32_t exponent = bits_of(s) >> 23;
    return (bits_of(s) & 0x7fffffu) == 0 && exponent >= kPow2MinExponent && exponent <= kPow2MaxExponent;
  });
}

uint64_t quantise(Tile* tile, const float* scale, const TileSink& sink, const Kernels& k) {
  if (tile->f32 == nullptr && !in_range(*tile, scale)) widen(tile);
  if (tile->f32 != nullptr) return k.quantise_f32(tile->f32, tile->rows, tile->cols, scale, sink);
  const auto bf16 = powers_of_two(tile->cols.num_blocks, scale) ? k.quantise_pow2 : k.quantise_bf16;
  return bf16(tile->bf16, tile->rows, tile->cols, scale, sink);
}

}  // namespace

bool counted_in_tiles(const PackDesc& d) { return d.extent[3] % 8 == 0 && d.col_phase % 8 == 0; }

uint64_t pack_tiles(const PackDesc& d, const TileUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad) {
  const Matrix matrix = matrix_of(d);
  uint64_t sum = 0;
  for (int64_t idx = 0; idx < unit.num_tiles(); ++idx) {
    Tile tile = load_tile(matrix, unit, idx, true, k);
    if (!tile.finite) {
      bad->report(unit.desc, first_nonfinite(matrix, region_of(matrix, unit)));
      return sum;
    }
    float scale[kTileBlocks];
    tile_scales(d, tile, scales_of(d, tile.block_row, tile.block_col), scale);
    const int64_t offset = tile.row * matrix.cols + tile.col;
    TileSink sink{};
    sink.dst = dst_base + d.dst_offset + offset;
    sink.dst_stride = matrix.cols;
    sink.first_word = d.wire_word + static_cast<uint64_t>(offset) / 8;
    sink.words_per_row = static_cast<uint64_t>(matrix.cols) / 8;
    sink.counted = counted_in_tiles(d);
    fetch_ahead(matrix, unit, idx, &sink);
    sum += quantise(&tile, scale, sink, k);
  }
  return sum;
}

}  // namespace wsync
