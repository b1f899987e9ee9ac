#include "cpu/tile.h"

#include <algorithm>

#include "core/dtype.h"

namespace wsync {
namespace {

// Scale blocks of one unit (1 MiB of bf16): enough tiles to fetch ahead, few enough to share a bucket between threads.
constexpr int64_t kUnitBlocks = 32;

void load_values(const Matrix& m, Tile* tile, bool keep, const Kernels& k) {
  const Region region = {tile->row, tile->rows, tile->col, tile->cols.cols()};
  int64_t stride = 0;
  if (m.src_dtype == kSrcBf16) {
    const auto* src = contiguous_rows<uint16_t>(m, region, &stride);
    uint16_t* values = scratch<uint16_t, Use::kTile>();
    k.load_bf16(keep ? values : nullptr, src, stride, tile->rows, tile->cols, tile->max_bits);
    tile->bf16 = values;
  } else if (m.src_dtype == kSrcF32) {
    const auto* src = contiguous_rows<float>(m, region, &stride);
    uint16_t* values = scratch<uint16_t, Use::kTile>();
    k.load_f32_round(keep ? values : nullptr, src, stride, tile->rows, tile->cols, tile->max_bits);
    tile->bf16 = values;
  } else if (m.src_dtype == kSrcF32Exact) {
    const auto* src = contiguous_rows<float>(m, region, &stride);
    float* values = scratch<float, Use::kTile>();
    k.load_f32(keep ? values : nullptr, src, stride, tile->rows, tile->cols, tile->max_bits);
    tile->f32 = values;
  } else {
    const auto* src = contiguous_rows<uint16_t>(m, region, &stride);
    float* values = scratch<float, Use::kTile>();
    convert_f16(values, src, stride, tile->rows, tile->cols.cols());
    k.load_f32(nullptr, values, kTileCols, tile->rows, tile->cols, tile->max_bits);
    tile->f32 = values;
  }
}

}  // namespace

void append_units(const Matrix& matrix, size_t desc, std::vector<TileUnit>* units) {
  const int64_t block_rows = matrix.num_block_rows();
  const int64_t block_cols = matrix.num_block_cols();
  if (block_rows == 0 || block_cols == 0) return;
  const int64_t cols = std::min(block_cols, kUnitBlocks);
  const int64_t rows = kUnitBlocks / cols;
  for (int64_t row = 0; row < block_rows; row += rows) {
    for (int64_t col = 0; col < block_cols; col += cols) {
      units->push_back({desc, row, std::min(block_rows, row + rows), col, std::min(block_cols, col + cols)});
    }
  }
}

Tile load_tile(const Matrix& m, const TileUnit& unit, int64_t idx, bool keep, const Kernels& k) {
  Tile tile{};
  const int64_t block_row = unit.block_row(idx);
  const int64_t block_col = unit.block_col(idx);
  tile.block_row = block_row;
  tile.block_col = block_col;
  tile.row = m.row_of(block_row);
  tile.col = m.col_of(block_col);
  tile.rows = static_cast<int>(m.row_of(block_row + 1) - tile.row);
  tile.cols.num_blocks = static_cast<int>(std::min<int64_t>(kTileBlocks, unit.col_end - block_col));
  for (int b = 0; b <= tile.cols.num_blocks; ++b) {
    tile.cols.begin[b] = static_cast<int>(m.col_of(block_col + b) - tile.col);
  }
  load_values(m, &tile, keep, k);
  tile.finite = true;
  for (int b = 0; b < tile.cols.num_blocks; ++b) {
    uint32_t& bits = tile.max_bits[b];
    tile.finite = tile.finite && bits < m.nonfinite_bits();
    // Rounding keeps order, so the largest rounded value is the rounding of the largest value.
    if (m.rounds_to_bf16() && bits < kF32Bf16Overflow) bits = static_cast<uint32_t>(bf16_of_f32_bits(bits)) << 16;
  }
  return tile;
}

void widen(Tile* tile) {
  float* values = scratch<float, Use::kTile>();
  for (int r = 0; r < tile->rows; ++r) {
    for (int i = r * kTileCols; i < r * kTileCols + tile->cols.cols(); ++i) values[i] = f32_of_bf16(tile->bf16[i]);
  }
  tile->bf16 = nullptr;
  tile->f32 = values;
}

void fetch_ahead(const Matrix& m, const TileUnit& unit, int64_t idx, TileSink* sink) {
  if (idx + 1 >= unit.num_tiles() || m.col_stride != 1) return;
  const int64_t row = m.row_of(unit.block_row(idx + 1));
  sink->ahead = reinterpret_cast<const uint8_t*>(m.address(row, m.col_of(unit.block_col(idx + 1))));
  sink->ahead_stride = m.row_stride * m.elem_bytes();
  sink->ahead_block_bytes = static_cast<int>(kScaleBlock * m.elem_bytes());
}

Region region_of(const Matrix& m, const TileUnit& unit) {
  const int64_t row = m.row_of(unit.row_begin);
  const int64_t col = m.col_of(unit.col_begin);
  return {row, m.row_of(unit.row_end) - row, col, m.col_of(unit.col_end) - col};
}

}  // namespace wsync
