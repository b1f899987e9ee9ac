// Matrices of source values, and their rows where a kernel can read them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

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
  // Whether the values that are quantised are f32 (as given) or bf16.
  bool is_f32() const { return src_dtype == kSrcF16 || src_dtype == kSrcF32Exact; }
  // Whether a kernel can read the rows where they are.
  bool in_place() const { return (col_stride == 1 || cols == 1) && src_dtype != kSrcF32 && src_dtype != kSrcF16; }
  // From here on the f32 bits of a source value are not finite, or its bf16 rounding is not.
  uint32_t nonfinite_bits() const;
};

Matrix matrix_of(const PackDesc& d);
Matrix matrix_of(const AmaxDesc& d);

// A rectangle of a matrix.
struct Region {
  int64_t row;
  int64_t rows;
  int64_t col;
  int64_t cols;
};

// Rows of bf16 (or of f32, by Matrix::is_f32), each of them contiguous.
struct Values {
  const uint8_t* data;
  int64_t row_bytes;
  const uint8_t* row(int64_t r) const { return data + r * row_bytes; }
};

// The values of a region: in place, or gathered and converted into a buffer of this thread that the next call
// overwrites; then the region has at most kTileRows x kTileCols elements. *max_bits becomes the maximum of itself and
// of the f32 bits of the magnitudes that a conversion met.
Values values_of(const Matrix& matrix, const Region& region, const Kernels& k, uint32_t* max_bits);

// A pointer to the region's first source element and the row stride in elements, after gathering where columns are not
// contiguous.
template <typename T>
const T* contiguous_rows(const Matrix& matrix, const Region& region, int64_t* row_stride);

// IEEE half to f32; `out` has kTileCols per row.
void convert_f16(float* out, const uint16_t* src, int64_t row_stride, int64_t rows, int64_t cols);

// The packed index (row * cols + col) of the first non-finite value of the region, or -1.
int64_t first_nonfinite(const Matrix& matrix, const Region& region);

// Whether a source value of this dtype at `address` counts as non-finite.
bool is_nonfinite(uint64_t address, int32_t src_dtype);

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Buffers of this thread for a tile, made on first use: for values, and for sources that are not contiguous.
enum class Use { kTile, kGathered };

template <typename T, Use kUse>
T* scratch() {
  constexpr size_t kValues = static_cast<size_t>(kTileRows) * kTileCols;
  static thread_local std::unique_ptr<T, FreeDeleter> buffer(
      static_cast<T*>(std::aligned_alloc(4096, kValues * sizeof(T))));
  return buffer.get();
}

}  // namespace wsync
