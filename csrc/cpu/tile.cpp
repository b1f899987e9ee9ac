#include "cpu/tile.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/dtype.h"

namespace wsync {
namespace {

// Scale blocks of one unit (1 MiB of bf16): enough tiles to fetch ahead, few enough to share a bucket between threads.
constexpr int64_t kUnitBlocks = 32;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

constexpr size_t kTileValues = static_cast<size_t>(kTileRows) * kTileCols;

// Buffers of this thread, made on first use: the tile itself, and one for sources that are not contiguous.
template <typename T, int kUse>
T* scratch() {
  static thread_local std::unique_ptr<T, FreeDeleter> buffer(
      static_cast<T*>(std::aligned_alloc(4096, kTileValues * sizeof(T))));
  return buffer.get();
}

// Gathers elements of a matrix whose columns are not contiguous, walking along the smaller stride.
template <typename T>
void gather_tile(T* out, uint64_t src, int64_t row_stride, int64_t col_stride, int rows, int cols) {
  const auto element = [&](int r, int c) {
    T value;
    std::memcpy(&value,
                reinterpret_cast<const void*>(
                    src + static_cast<uint64_t>((r * row_stride + c * col_stride) * static_cast<int64_t>(sizeof(T)))),
                sizeof(T));
    return value;
  };
  if (std::abs(row_stride) < std::abs(col_stride)) {
    for (int c = 0; c < cols; ++c) {
      for (int r = 0; r < rows; ++r) out[r * kTileCols + c] = element(r, c);
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < cols; ++c) out[r * kTileCols + c] = element(r, c);
    }
  }
}

// A pointer to the tile's first value and the row stride, after gathering where columns are not contiguous.
template <typename T>
const T* contiguous_rows(const Matrix& m, const Tile& tile, int64_t* row_stride) {
  const uint64_t src = m.address(tile.row, tile.col);
  *row_stride = m.row_stride;
  if (m.col_stride == 1 || tile.cols.cols() == 1) return reinterpret_cast<const T*>(src);
  T* gathered = scratch<T, 1>();
  gather_tile(gathered, src, m.row_stride, m.col_stride, tile.rows, tile.cols.cols());
  *row_stride = kTileCols;
  return gathered;
}

void convert_f16(float* out, const uint16_t* src, int64_t row_stride, int rows, int cols) {
  for (int r = 0; r < rows; ++r, src += row_stride, out += kTileCols) {
    for (int c = 0; c < cols; ++c) {
      uint16_t half;
      std::memcpy(&half, reinterpret_cast<const uint8_t*>(src) + 2 * static_cast<size_t>(c), 2);
      out[c] = f32_of_f16(half);
    }
  }
}

void load_values(const Matrix& m, Tile* tile, bool keep, const Kernels& k) {
  int64_t stride = 0;
  if (m.src_dtype == kSrcBf16) {
    const auto* src = contiguous_rows<uint16_t>(m, *tile, &stride);
    uint16_t* values = scratch<uint16_t, 0>();
    k.load_bf16(keep ? values : nullptr, src, stride, tile->rows, tile->cols, tile->max_bits);
    tile->bf16 = values;
  } else if (m.src_dtype == kSrcF32) {
    const auto* src = contiguous_rows<float>(m, *tile, &stride);
    uint16_t* values = scratch<uint16_t, 0>();
    k.load_f32_round(keep ? values : nullptr, src, stride, tile->rows, tile->cols, tile->max_bits);
    tile->bf16 = values;
  } else if (m.src_dtype == kSrcF32Exact) {
    const auto* src = contiguous_rows<float>(m, *tile, &stride);
    float* values = scratch<float, 0>();
    k.load_f32(keep ? values : nullptr, src, stride, tile->rows, tile->cols, tile->max_bits);
    tile->f32 = values;
  } else {
    const auto* src = contiguous_rows<uint16_t>(m, *tile, &stride);
    float* values = scratch<float, 0>();
    convert_f16(values, src, stride, tile->rows, tile->cols.cols());
    k.load_f32(nullptr, values, kTileCols, tile->rows, tile->cols, tile->max_bits);
    tile->f32 = values;
  }
}

}  // namespace

int64_t Matrix::row_of(int64_t block) const {
  return std::min(rows, std::max<int64_t>(0, block * kScaleBlock - row_phase));
}

int64_t Matrix::col_of(int64_t block) const {
  return std::min(cols, std::max<int64_t>(0, block * kScaleBlock - col_phase));
}

uint64_t Matrix::address(int64_t row, int64_t col) const {
  return src + static_cast<uint64_t>((row * row_stride + col * col_stride) * elem_bytes());
}

Matrix matrix_of(const PackDesc& d) {
  return {d.src, d.src_stride[2], d.src_stride[3], d.extent[2], d.extent[3], d.row_phase, d.col_phase, d.src_dtype};
}

Matrix matrix_of(const AmaxDesc& d) {
  return {d.src, d.src_stride[0], d.src_stride[1], d.extent[0], d.extent[1], d.row_phase, d.col_phase, d.src_dtype};
}

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
    tile.finite = tile.finite && bits < (m.rounds_to_bf16() ? kF32Bf16Overflow : kF32Infinity);
    // Rounding keeps order, so the largest rounded value is the rounding of the largest value.
    if (m.rounds_to_bf16() && bits < kF32Bf16Overflow) bits = static_cast<uint32_t>(bf16_of_f32_bits(bits)) << 16;
  }
  return tile;
}

void widen(Tile* tile) {
  float* values = scratch<float, 0>();
  for (int r = 0; r < tile->rows; ++r) {
    for (int i = r * kTileCols; i < r * kTileCols + tile->cols.cols(); ++i) values[i] = f32_of_bf16(tile->bf16[i]);
  }
  tile->bf16 = nullptr;
  tile->f32 = values;
}

bool is_nonfinite(uint64_t address, int32_t src_dtype) {
  if (src_dtype == kSrcBf16 || src_dtype == kSrcF16) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(address), 2);
    return (bits & 0x7fffu) >= (src_dtype == kSrcBf16 ? kBf16Infinity : kF16Infinity);
  }
  if (src_dtype == kSrcF64) {
    uint64_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(address), 8);
    return (static_cast<uint32_t>(bits >> 32) & 0x7fffffffu) >= kF64InfinityHigh;
  }
  uint32_t bits;
  std::memcpy(&bits, reinterpret_cast<const void*>(address), 4);
  return (bits & 0x7fffffffu) >= (src_dtype == kSrcF32 ? kF32Bf16Overflow : kF32Infinity);
}

void fetch_ahead(const Matrix& m, const TileUnit& unit, int64_t idx, TileSink* sink) {
  if (idx + 1 >= unit.num_tiles() || m.col_stride != 1) return;
  const int64_t row = m.row_of(unit.block_row(idx + 1));
  sink->ahead = reinterpret_cast<const uint8_t*>(m.address(row, m.col_of(unit.block_col(idx + 1))));
  sink->ahead_stride = m.row_stride * m.elem_bytes();
  sink->ahead_block_bytes = static_cast<int>(kScaleBlock * m.elem_bytes());
}

int64_t first_nonfinite(const Matrix& m, const TileUnit& unit) {
  const int64_t col_begin = m.col_of(unit.col_begin);
  const int64_t col_end = m.col_of(unit.col_end);
  for (int64_t row = m.row_of(unit.row_begin); row < m.row_of(unit.row_end); ++row) {
    for (int64_t col = col_begin; col < col_end; ++col) {
      if (is_nonfinite(m.address(row, col), m.src_dtype)) return row * m.cols + col;
    }
  }
  return -1;
}

}  // namespace wsync
