#include <vector>

#include "core/dtype.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/tile.h"

namespace wsync {
namespace {

// Several units may share a cell: f32 values that are not negative order like their bits.
void raise(uint64_t address, uint32_t bits) {
  auto* cell = reinterpret_cast<uint32_t*>(address);
  uint32_t now = __atomic_load_n(cell, __ATOMIC_RELAXED);
  while (now < bits && !__atomic_compare_exchange_n(cell, &now, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace

void amax(const AmaxDesc* descs, size_t num_descs, int num_threads, Isa isa, FirstBad* bad) {
  const Kernels& k = kernels_for(isa);
  std::vector<TileUnit> units;
  for (size_t i = 0; i < num_descs; ++i) append_units(matrix_of(descs[i]), i, &units);
  parallel_for(units.size(), num_threads, [&](size_t i) {
    const TileUnit& unit = units[i];
    const AmaxDesc& d = descs[unit.desc];
    const Matrix matrix = matrix_of(d);
    bool finite = true;
    for (int64_t idx = 0; idx < unit.num_tiles(); ++idx) {
      const Tile tile = load_tile(matrix, unit, idx, false, k);
      finite = finite && tile.finite;
      for (int b = 0; b < tile.cols.num_blocks; ++b) {
        raise(d.amax + 4 * static_cast<uint64_t>(tile.block_row * d.amax_stride + tile.block_col + b),
              tile.max_bits[b]);
      }
    }
    if (!finite) bad->report(unit.desc, first_nonfinite(matrix, unit));
  });
}

void scales_from_amax(const AmaxDesc* descs, size_t num_descs) {
  for (size_t i = 0; i < num_descs; ++i) {
    const AmaxDesc& d = descs[i];
    const Matrix matrix = matrix_of(d);
    for (int64_t row = 0; row < matrix.num_block_rows(); ++row) {
      const auto* cells = reinterpret_cast<const float*>(d.amax) + row * d.amax_stride;
      auto* scales = reinterpret_cast<float*>(d.scales) + row * d.scale_stride;
      for (int64_t col = 0; col < matrix.num_block_cols(); ++col) {
        scales[col] = d.recipe_op == kOpFp8Block128 ? scale_pow2(cells[col]) : scale_f32(cells[col]);
      }
    }
  }
}

}  // namespace wsync
