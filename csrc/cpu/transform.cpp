// Encoded matrices by value: dequantised, or requantised to power-of-two scales.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/dtype.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/tile.h"

namespace wsync {
namespace {

// Some rows of a matrix; of a requantisation: one row of scale blocks.
struct Unit {
  size_t desc;
  int64_t begin;
  int64_t end;
};

constexpr int64_t kUnitValues = 128 << 10;

bool in_blocks(int32_t recipe_op) {
  return recipe_op == kOpFp8Block128 || recipe_op == kOpFp8Block128F32 || recipe_op == kOpFp8Scaled;
}

std::vector<Unit> units_of(const TransformDesc* descs, size_t num_descs) {
  std::vector<Unit> units;
  for (size_t i = 0; i < num_descs; ++i) {
    const TransformDesc& d = descs[i];
    if (d.extent[0] == 0 || d.extent[1] == 0) continue;
    const int64_t step = d.op == kTransformRequantE8m0 ? kScaleBlock : std::max<int64_t>(1, kUnitValues / d.extent[1]);
    for (int64_t row = 0; row < d.extent[0]; row += step) {
      units.push_back({i, row, std::min(d.extent[0], row + step)});
    }
  }
  return units;
}

// Rows of an encoded matrix as f32: code * scale, one rounding.
class Decoder {
 public:
  Decoder(const TransformDesc& d, const Kernels& k) : d_(d), k_(k) {}

  // Columns [begin, end) of a row.
  void row(float* out, int64_t row, int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end;) {
      const int64_t stop = std::min(end, end_of_block(at));
      decode(out, row, at, stop - at, scale(row, at));
      out += stop - at;
      at = stop;
    }
  }

 private:
  int64_t end_of_block(int64_t col) const {
    if (in_blocks(d_.recipe_op)) return ((col + d_.col_phase) / kScaleBlock + 1) * kScaleBlock - d_.col_phase;
    if (d_.recipe_op == kOpMxfp8) return (col / kMxGroup + 1) * kMxGroup;
    if (d_.recipe_op == kOpNvfp4) return (col / kNvGroup + 1) * kNvGroup;
    return d_.extent[1];
  }

  float f32_scale(int64_t row, int64_t col) const {
    return reinterpret_cast<const float*>(d_.scales)[row * d_.scale_stride + col];
  }
  uint8_t byte_scale(int64_t row, int64_t col) const {
    return reinterpret_cast<const uint8_t*>(d_.scales)[row * d_.scale_stride + col];
  }

  float scale(int64_t row, int64_t col) const {
    switch (d_.recipe_op) {
      case kOpFp8Channel:
      case kOpFp8ChannelScaled:
        return f32_scale(row, 0);
      case kOpFp8Tensor:
        return f32_scale(0, 0);
      case kOpMxfp8:
        return f32_of_e8m0(byte_scale(row, col / kMxGroup));
      case kOpNvfp4:
        return f32_of_e4m3(byte_scale(row, col / kNvGroup)) * *reinterpret_cast<const float*>(d_.tensor_scale);
      default:
        return f32_scale((row + d_.row_phase) / kScaleBlock, (col + d_.col_phase) / kScaleBlock);
    }
  }

  void decode(float* out, int64_t row, int64_t col, int64_t n, float scale) const {
    const auto* codes = reinterpret_cast<const uint8_t*>(d_.codes) + row * d_.code_stride;
    const auto count = static_cast<size_t>(n);
    if (d_.recipe_op != kOpNvfp4) return k_.decode_e4m3(out, codes + col, count, scale);
    k_.decode_e2m1(out, codes + col / 2, count, scale);
  }

  const TransformDesc& d_;
  const Kernels& k_;
};

template <typename T, typename Convert>
void store(uint64_t dst, int64_t stride, const float* values, int64_t n, Convert convert) {
  for (int64_t i = 0; i < n; ++i, dst += static_cast<uint64_t>(stride * static_cast<int64_t>(sizeof(T)))) {
    const T value = convert(values[i]);
    std::memcpy(reinterpret_cast<void*>(dst), &value, sizeof(T));
  }
}

void store_row(const TransformDesc& d, int64_t row, int64_t col, const float* values, int64_t n, const Kernels& k) {
  const int64_t elem_bytes = source_bytes(d.dst_dtype);
  const uint64_t dst = d.dst + static_cast<uint64_t>((row * d.dst_stride[0] + col * d.dst_stride[1]) * elem_bytes);
  if (d.dst_stride[1] == 1 && d.dst_dtype == kSrcBf16) {
    uint32_t max_bits = 0;
    k.round_bf16(reinterpret_cast<void*>(dst), values, static_cast<size_t>(n), 0, &max_bits);
    return;
  }
  switch (d.dst_dtype) {
    case kSrcBf16:
      return store<uint16_t>(dst, d.dst_stride[1], values, n, [](float v) { return bf16_of_f32_bits(bits_of(v)); });
    case kSrcF16:
      return store<uint16_t>(dst, d.dst_stride[1], values, n, f16_of_f32);
    default:
      return store<float>(dst, d.dst_stride[1], values, n, [](float v) { return v; });
  }
}

void dequantise(const TransformDesc& d, const Unit& unit, const Kernels& k) {
  const Decoder decoder(d, k);
  float values[kTileCols];
  for (int64_t row = unit.begin; row < unit.end; ++row) {
    for (int64_t col = 0; col < d.extent[1]; col += kTileCols) {
      const int64_t end = std::min<int64_t>(d.extent[1], col + kTileCols);
      decoder.row(values, row, col, end);
      store_row(d, row, col, values, end - col, k);
    }
  }
}

// The packed index of the first decoded value of a unit that is not finite, or -1.
int64_t first_nonfinite(const Decoder& decoder, const Unit& unit, int64_t cols) {
  float values[kTileCols];
  for (int64_t row = unit.begin; row < unit.end; ++row) {
    for (int64_t col = 0; col < cols; col += kTileCols) {
      const int64_t n = std::min<int64_t>(kTileCols, cols - col);
      decoder.row(values, row, col, col + n);
      for (int64_t c = 0; c < n; ++c) {
        if ((bits_of(values[c]) & 0x7fffffffu) >= kF32Infinity) return row * cols + col + c;
      }
    }
  }
  return -1;
}

// One row of blocks, kTileBlocks at a time: all codes of a tile are read before any is written.
void requantise(const TransformDesc& d, const Unit& unit, const Kernels& k, FirstBad* bad) {
  const Decoder decoder(d, k);
  const int rows = static_cast<int>(unit.end - unit.begin);
  float* tile = scratch<float, Use::kTile>();
  auto* codes = reinterpret_cast<uint8_t*>(scratch<float, Use::kGathered>());
  for (int64_t col = 0; col < d.extent[1]; col += kTileCols) {
    TileCols cols{};
    const int64_t width = std::min<int64_t>(kTileCols, d.extent[1] - col);
    cols.num_blocks = static_cast<int>((width + kScaleBlock - 1) / kScaleBlock);
    for (int b = 0; b <= cols.num_blocks; ++b) cols.begin[b] = static_cast<int>(std::min(width, b * kScaleBlock));
    for (int r = 0; r < rows; ++r) decoder.row(tile + r * kTileCols, unit.begin + r, col, col + width);
    uint32_t max_bits[kTileBlocks];
    k.load_f32(nullptr, tile, kTileCols, rows, cols, max_bits);
    if (*std::max_element(max_bits, max_bits + cols.num_blocks) >= kF32Infinity) {
      bad->report(unit.desc, first_nonfinite(decoder, unit, d.extent[1]));
      return;
    }
    float scale[kTileBlocks];
    auto* scales = reinterpret_cast<float*>(d.dst_scales) + unit.begin / kScaleBlock * d.dst_scale_stride;
    for (int b = 0; b < cols.num_blocks; ++b) {
      scale[b] = scale_pow2(f32_of(max_bits[b]));
      scales[col / kScaleBlock + b] = scale[b];
    }
    TileSink sink{};
    const bool direct = d.dst_stride[1] == 1;
    const uint64_t dst = d.dst + static_cast<uint64_t>(unit.begin * d.dst_stride[0] + col * d.dst_stride[1]);
    sink.dst = direct ? reinterpret_cast<uint8_t*>(dst) : codes;
    sink.dst_stride = direct ? d.dst_stride[0] : kTileCols;
    k.quantise_f32(tile, rows, cols, scale, sink);
    for (int r = 0; !direct && r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        reinterpret_cast<uint8_t*>(dst)[r * d.dst_stride[0] + c * d.dst_stride[1]] = codes[r * kTileCols + c];
      }
    }
  }
}

}  // namespace

void transform(const TransformDesc* descs, size_t num_descs, int num_threads, Isa isa, FirstBad* bad) {
  const Kernels& k = kernels_for(isa);
  const std::vector<Unit> units = units_of(descs, num_descs);
  parallel_for(units.size(), num_threads, [&](size_t i) {
    const TransformDesc& d = descs[units[i].desc];
    if (d.op == kTransformDequantise) {
      dequantise(d, units[i], k);
    } else {
      requantise(d, units[i], k, bad);
    }
    k.fence();
  });
}

}  // namespace wsync
