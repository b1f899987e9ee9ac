// Tiles: the pieces of a matrix that the fp8 operations work on, one row of scale blocks high.
#pragma once

#include <cstdint>
#include <vector>

#include "core/descriptors.h"
#include "cpu/kernels.h"

namespace wsync {

// A strided matrix whose scale blocks begin where the tensor's own grid has them: the first block of a box may be
// shorter by the phase.
struct Matrix {
  uint64_t src;
  int64_t row_stride;  // elements
  int64_t col_stride;
  int64_t rows;
  int64_t cols;
  int32_t row_phase;
  int32_t col_phase;
  int32_t src_dtype;

  int64_t num_block_rows() const { return rows == 0 ? 0 : (row_phase + rows + kScaleBlock - 1) / kScaleBlock; }
  int64_t num_block_cols() const { return cols == 0 ? 0 : (col_phase + cols + kScaleBlock - 1) / kScaleBlock; }
  // First row (column) of block i; block num_block_rows() begins at `rows`.
  int64_t row_of(int64_t block) const;
  int64_t col_of(int64_t block) const;
  uint64_t address(int64_t row, int64_t col) const;
  int64_t elem_bytes() const { return src_dtype == kSrcBf16 || src_dtype == kSrcF16 ? 2 : 4; }

  bool rounds_to_bf16() const { return src_dtype == kSrcF32; }
  // Whether tiles hold f32 (values as given) or bf16.
  bool f32_tiles() const { return src_dtype == kSrcF16 || src_dtype == kSrcF32Exact; }
};

Matrix matrix_of(const PackDesc& d);
Matrix matrix_of(const AmaxDesc& d);

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

// The packed index (row * cols + col) of the first non-finite value of the unit.
int64_t first_nonfinite(const Matrix& matrix, const TileUnit& unit);

// Whether a source value of this dtype at `address` counts as non-finite.
bool is_nonfinite(uint64_t address, int32_t src_dtype);

}  // namespace wsync
