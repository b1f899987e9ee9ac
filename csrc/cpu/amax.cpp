#include <algorithm>
#include <vector>

#include "core/dtype.h"
#include "core/float_mode.h"
#include "cpu/ops.h"
#include "cpu/pack_parts.h"
#include "cpu/thread_pool.h"
#include "cpu/tile.h"

namespace wsync {
namespace {

bool in_blocks(const AmaxDesc& d) { return d.recipe_op == kOpFp8Block128 || d.recipe_op == kOpFp8Block128F32; }

// Several units may share a cell: f32 values that are not negative order like their bits.
void raise(uint64_t address, uint32_t bits) {
  auto* cell = reinterpret_cast<uint32_t*>(address);
  uint32_t now = __atomic_load_n(cell, __ATOMIC_RELAXED);
  while (now < bits && !__atomic_compare_exchange_n(cell, &now, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

uint64_t cell(const AmaxDesc& d, int64_t row, int64_t col) {
  return d.amax + 4 * static_cast<uint64_t>(row * d.amax_stride + col);
}

void amax_tiles(const AmaxDesc& d, const TileUnit& unit, const Kernels& k, FirstBad* bad) {
  const Matrix matrix = matrix_of(d);
  bool finite = true;
  for (int64_t idx = 0; idx < unit.num_tiles(); ++idx) {
    const Tile tile = load_tile(matrix, unit, idx, false, k);
    finite = finite && tile.finite;
    for (int b = 0; b < tile.cols.num_blocks; ++b) {
      raise(cell(d, tile.block_row, tile.block_col + b), tile.max_bits[b]);
    }
  }
  if (!finite) bad->report(unit.desc, first_nonfinite(matrix, region_of(matrix, unit)));
}

// Rows share one cell, or have one each.
void amax_rows(const AmaxDesc& d, const RowUnit& unit, const Kernels& k, FirstBad* bad) {
  const Matrix matrix = matrix_of(d);
  const RowKernels& kernels = k.rows[matrix.is_f32() ? 1 : 0];
  const int64_t cols = matrix.in_place() ? matrix.cols : std::min<int64_t>(matrix.cols, kTileCols);
  const int64_t rows = matrix.in_place() ? unit.end - unit.begin : kTileRows;
  uint32_t worst = 0;
  for (int64_t row = unit.begin; row < unit.end; row += rows) {
    for (int64_t col = 0; col < matrix.cols; col += cols) {
      const Region region = {row, std::min(rows, unit.end - row), col, std::min(cols, matrix.cols - col)};
      const Values values = values_of(matrix, region, k, &worst);
      uint32_t largest = 0;
      for (int64_t r = 0; r < region.rows; ++r) {
        const uint32_t bits = kernels.largest(values.row(r), static_cast<size_t>(region.cols));
        if (d.recipe_op == kOpFp8Channel) raise(cell(d, row + r, 0), bits);
        largest = std::max(largest, bits);
      }
      if (d.recipe_op != kOpFp8Channel) raise(d.amax, largest);
      worst = std::max(worst, largest);
    }
  }
  if (worst >= matrix.nonfinite_bits()) {
    bad->report(unit.desc, first_nonfinite(matrix, {unit.begin, unit.end - unit.begin, 0, matrix.cols}));
  }
}

float scale_of(int32_t recipe_op, float amax) {
  switch (recipe_op) {
    case kOpFp8Block128:
      return scale_pow2(amax);
    case kOpFp8Block128F32:
      return scale_f32(amax);
    case kOpFp8Channel:
      return scale_channel(amax);
    case kOpFp8Tensor:
      return scale_tensor(amax);
    default:
      return scale2_nvfp4(amax);
  }
}

}  // namespace

void amax(const AmaxDesc* descs, size_t num_descs, int num_threads, Isa isa, FirstBad* bad) {
  const Kernels& k = kernels_for(isa);
  std::vector<TileUnit> tiles;
  std::vector<RowUnit> rows;
  for (size_t i = 0; i < num_descs; ++i) {
    if (in_blocks(descs[i])) {
      append_units(matrix_of(descs[i]), i, &tiles);
    } else {
      append_rows(matrix_of(descs[i]), i, &rows);
    }
  }
  parallel_for(tiles.size() + rows.size(), num_threads, [&](size_t i) {
    if (i < tiles.size()) return amax_tiles(descs[tiles[i].desc], tiles[i], k, bad);
    const RowUnit& unit = rows[i - tiles.size()];
    amax_rows(descs[unit.desc], unit, k, bad);
  });
}

void scales_from_amax(const AmaxDesc* descs, size_t num_descs) {
  const FloatMode mode;
  for (size_t i = 0; i < num_descs; ++i) {
    const AmaxDesc& d = descs[i];
    const Matrix matrix = matrix_of(d);
    if (matrix.rows == 0 || matrix.cols == 0) continue;
    const bool in_grid = in_blocks(d);
    const int64_t rows = in_grid ? matrix.num_block_rows() : (d.recipe_op == kOpFp8Channel ? matrix.rows : 1);
    const int64_t cols = in_grid ? matrix.num_block_cols() : 1;
    for (int64_t row = 0; row < rows; ++row) {
      const auto* cells = reinterpret_cast<const float*>(d.amax) + row * d.amax_stride;
      auto* scales = reinterpret_cast<float*>(d.scales) + row * d.scale_stride;
      for (int64_t col = 0; col < cols; ++col) scales[col] = scale_of(d.recipe_op, cells[col]);
    }
  }
}

}  // namespace wsync
