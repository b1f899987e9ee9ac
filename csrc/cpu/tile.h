// Tiles: the pieces of a matrix that the block-scaled fp8 operations work on, one row of scale blocks high.
#pragma once

#include <cstdint>
#include <vector>

#include "core/descriptors.h"
#include "cpu/kernels.h"
#include "cpu/values.h"

namespace wsync {

// The blocks [row_begin, row_end) x [col_begin, col_end) of a matrix: the work of one thread at a time.
struct TileUnit {
  size_t desc;
  int64_t row_begin;
  int64_t row_end;
  int64_t col_begin;
  int64_t col_end;

  // Tiles are taken row by row. Tile `idx` begins at these blocks.
  int64_t tiles_per_row() const { return (col_end - col_begin + kTileBlocks - 1) / kTileBlocks; }
  int64_t num_tiles() const { return (row_end - row_begin) * tiles_per_row(); }
  int64_t block_row(int64_t idx) const { return row_begin + idx / tiles_per_row(); }
  int64_t block_col(int64_t idx) const { return col_begin + idx % tiles_per_row() * kTileBlocks; }
};

// Appends the units of `matrix`, in row-major order.
void append_units(const Matrix& matrix, size_t desc, std::vector<TileUnit>* units);

// Up to kTileBlocks blocks of one block row, loaded.
struct Tile {
  int64_t block_row;
  int64_t block_col;
  int64_t row;  // of the matrix
  int64_t col;
  int rows;
  TileCols cols;
  uint32_t max_bits[kTileBlocks];  // f32 bits of the amax of each block
  const uint16_t* bf16;            // kTileCols per row; one of the two is set
  const float* f32;
  bool finite;  // all values, and their bf16 roundings where they are rounded
};

// Loads tile `idx` of the unit into a buffer of this thread that the next call overwrites. With `keep` false only
// max_bits and `finite` are good.
Tile load_tile(const Matrix& matrix, const TileUnit& unit, int64_t idx, bool keep, const Kernels& k);

// Tells the sink of tile `idx` what to fetch ahead for tile idx + 1.
void fetch_ahead(const Matrix& matrix, const TileUnit& unit, int64_t idx, TileSink* sink);

// Turns a bf16 tile into an f32 tile of the same values, in another buffer of this thread.
void widen(Tile* tile);

// The elements of the unit.
Region region_of(const Matrix& matrix, const TileUnit& unit);

}  // namespace wsync
