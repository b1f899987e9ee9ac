#include "cpu/values.h"

#include <algorithm>
#include <cstring>

#include "core/dtype.h"

namespace wsync {
namespace {

// Gathers elements of a matrix whose columns are not contiguous, walking along the smaller stride.
template <typename T>
void gather_tile(T* out, uint64_t src, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols) {
  const auto element = [&](int64_t r, int64_t c) {
    T value;
    std::memcpy(&value,
                reinterpret_cast<const void*>(
                    src + static_cast<uint64_t>((r * row_stride + c * col_stride) * static_cast<int64_t>(sizeof(T)))),
                sizeof(T));
    return value;
  };
  if (std::abs(row_stride) < std::abs(col_stride)) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r) out[r * kTileCols + c] = element(r, c);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out[r * kTileCols + c] = element(r, c);
    }
  }
}

template <typename T>
Values rows_of(const T* first, int64_t row_stride) {
  return {reinterpret_cast<const uint8_t*>(first), row_stride * static_cast<int64_t>(sizeof(T))};
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

uint32_t Matrix::nonfinite_bits() const { return rounds_to_bf16() ? kF32Bf16Overflow : kF32Infinity; }

Matrix matrix_of(const PackDesc& d) {
  return {d.src, d.src_stride[2], d.src_stride[3], d.extent[2], d.extent[3], d.row_phase, d.col_phase, d.src_dtype};
}

Matrix matrix_of(const AmaxDesc& d) {
  return {d.src, d.src_stride[0], d.src_stride[1], d.extent[0], d.extent[1], d.row_phase, d.col_phase, d.src_dtype};
}

template <typename T>
const T* contiguous_rows(const Matrix& m, const Region& region, int64_t* row_stride) {
  const uint64_t src = m.address(region.row, region.col);
  *row_stride = m.row_stride;
  if (m.col_stride == 1 || region.cols == 1) return reinterpret_cast<const T*>(src);
  T* gathered = scratch<T, Use::kGathered>();
  gather_tile(gathered, src, m.row_stride, m.col_stride, region.rows, region.cols);
  *row_stride = kTileCols;
  return gathered;
}

template const uint16_t* contiguous_rows(const Matrix&, const Region&, int64_t*);
template const float* contiguous_rows(const Matrix&, const Region&, int64_t*);

// Without a branch, so that the compiler can take several at a time; equals f32_of_f16.
void convert_f16(float* out, const uint16_t* src, int64_t row_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, src += row_stride, out += kTileCols) {
    for (int64_t c = 0; c < cols; ++c) {
      uint16_t half;
      std::memcpy(&half, reinterpret_cast<const uint8_t*>(src) + 2 * c, 2);
      const uint32_t magnitude = half & 0x7fffu;
      const uint32_t finite = bits_of(f32_of(magnitude << 13) * 0x1p112f);  // exact, of subnormal halves too
      const uint32_t value = magnitude >= kF16Infinity ? (magnitude << 13) | kF32Infinity : finite;
      out[c] = f32_of(value | static_cast<uint32_t>(half & 0x8000u) << 16);
    }
  }
}

Values values_of(const Matrix& m, const Region& region, const Kernels& k, uint32_t* max_bits) {
  if (m.in_place()) {
    return {reinterpret_cast<const uint8_t*>(m.address(region.row, region.col)), m.row_stride * m.elem_bytes()};
  }
  int64_t stride = 0;
  if (m.src_dtype == kSrcF32) {
    const auto* src = contiguous_rows<float>(m, region, &stride);
    uint16_t* tile = scratch<uint16_t, Use::kTile>();
    const TileCols cols = {1, {0, static_cast<int>(region.cols)}};
    uint32_t largest = 0;
    k.load_f32_round(tile, src, stride, static_cast<int>(region.rows), cols, &largest);
    *max_bits = std::max(*max_bits, largest);
    return rows_of(tile, kTileCols);
  }
  if (m.src_dtype == kSrcF16) {
    const auto* src = contiguous_rows<uint16_t>(m, region, &stride);
    float* tile = scratch<float, Use::kTile>();
    convert_f16(tile, src, stride, region.rows, region.cols);
    return rows_of(tile, kTileCols);
  }
  if (m.src_dtype == kSrcBf16) {
    const auto* src = contiguous_rows<uint16_t>(m, region, &stride);
    return rows_of(src, stride);
  }
  const auto* src = contiguous_rows<float>(m, region, &stride);
  return rows_of(src, stride);
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

int64_t first_nonfinite(const Matrix& m, const Region& region) {
  for (int64_t row = region.row; row < region.row + region.rows; ++row) {
    for (int64_t col = region.col; col < region.col + region.cols; ++col) {
      if (is_nonfinite(m.address(row, col), m.src_dtype)) return row * m.cols + col;
    }
  }
  return -1;
}

}  // namespace wsync
