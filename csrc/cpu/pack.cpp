#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/dtype.h"
#include "cpu/box.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/tile.h"

namespace wsync {
namespace {

constexpr int64_t kUnitElems = 64 << 10;
constexpr int64_t kScratchElems = 2 << 10;
// Shorter runs are gathered first: a kernel's call costs more than a copy of them.
constexpr int64_t kDirectRunBytes = 128;

bool is_fp8(const PackDesc& d) { return d.op >= kOpFp8Block128; }

// Copies and bf16: a unit is a range of packed elements that begins on a digest word.
struct RowUnit {
  size_t desc;
  int64_t begin;
  int64_t end;
};

Box box_of(const PackDesc& d) { return Box(d.src, d.src_stride, d.extent, kNumDims, d.elem_bytes); }

int64_t wire_bytes(const PackDesc& d) { return d.op == kOpCopy ? d.elem_bytes : 2; }

// The dtype whose rules the values follow: every f32 that is not copied is rounded here, so one that rounds to infinity
// is bad however it was declared.
int32_t checked_dtype(const PackDesc& d) {
  return d.op == kOpBf16 && d.src_dtype == kSrcF32Exact ? static_cast<int32_t>(kSrcF32) : d.src_dtype;
}

// From here on what the kernels of put() report as the maximum is not finite.
uint32_t nonfinite_bits(const PackDesc& d) {
  if (d.src_dtype == kSrcBf16) return kF32Infinity;
  if (d.op == kOpBf16) return kF32Bf16Overflow;
  switch (d.src_dtype) {
    case kSrcF16:
      return static_cast<uint32_t>(kF16Infinity) << 16;
    case kSrcF32Exact:
      return kF32Infinity;
    case kSrcF64:
      return kF64InfinityHigh;
    default:
      return ~0u;  // bytes are not looked at
  }
}

// n contiguous source elements to the wire.
uint64_t put(const PackDesc& d, uint8_t* dst, const void* src, int64_t n, uint64_t word, uint32_t* max_bits,
             const Kernels& k) {
  const auto count = static_cast<size_t>(n);
  if (d.src_dtype == kSrcBf16) return k.copy_float16(dst, src, count, word, max_bits);
  if (d.op == kOpBf16) return k.round_bf16(dst, src, count, word, max_bits);
  switch (d.src_dtype) {
    case kSrcF16:
      return k.copy_float16(dst, src, count, word, max_bits);
    case kSrcF32Exact:
      return k.copy_float32(dst, src, count, word, max_bits);
    case kSrcF64:
      return k.copy_float64(dst, src, count, word, max_bits);
    default:
      return k.copy(dst, src, count * static_cast<size_t>(d.elem_bytes), word);
  }
}

uint64_t put_f16(uint8_t* dst, const uint8_t* src, int64_t n, uint64_t word, uint32_t* max_bits, const Kernels& k) {
  float values[kScratchElems];
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, src + 2 * i, 2);
    values[i] = f32_of_f16(half);
  }
  return k.round_bf16(dst, values, static_cast<size_t>(n), word, max_bits);
}

uint64_t pack_rows(const PackDesc& d, const RowUnit& unit, uint8_t* dst_base, const Kernels& k, uint32_t* max_bits) {
  const Box box = box_of(d);
  const int64_t wire = wire_bytes(d);
  uint8_t* dst = dst_base + d.dst_offset + unit.begin * wire;
  uint64_t word = d.wire_word + static_cast<uint64_t>(unit.begin * wire) / 8;
  uint64_t sum = 0;
  const int64_t run_bytes = box.run() * wire;
  const bool converted = d.op == kOpBf16 && d.src_dtype == kSrcF16;
  const bool direct = box.contiguous_runs() && !converted &&
                      (box.run() == box.numel() || (run_bytes % 8 == 0 && run_bytes >= kDirectRunBytes));
  if (direct) {
    box.for_read_runs(unit.begin, unit.end, [&](uint64_t src, int64_t n) {
      sum += put(d, dst, reinterpret_cast<const void*>(src), n, word, max_bits, k);
      dst += n * wire;
      word += static_cast<uint64_t>(n * wire) / 8;
    });
    return sum;
  }
  alignas(64) uint8_t scratch[kScratchElems * 8];
  for (int64_t at = unit.begin; at < unit.end; at += kScratchElems) {
    const int64_t end = std::min(unit.end, at + kScratchElems);
    box.gather(scratch, at, end);
    sum += converted ? put_f16(dst, scratch, end - at, word, max_bits, k)
                     : put(d, dst, scratch, end - at, word, max_bits, k);
    dst += (end - at) * wire;
    word += static_cast<uint64_t>((end - at) * wire) / 8;
  }
  return sum;
}

void report_row(const PackDesc& d, const RowUnit& unit, FirstBad* bad) {
  const Box box = box_of(d);
  const int32_t src_dtype = checked_dtype(d);
  int64_t element = unit.begin;
  int64_t first = -1;
  box.for_runs(unit.begin, unit.end, [&](uint64_t src, int64_t n) {
    for (int64_t i = 0; i < n && first < 0; ++i) {
      if (is_nonfinite(src + static_cast<uint64_t>(i * box.run_stride()), src_dtype)) first = element + i;
    }
    element += n;
  });
  bad->report(unit.desc, first);
}

// Rows and blocks of a matrix begin on digest words, so that the digest can be taken while quantising.
bool counted_in_tiles(const PackDesc& d) { return d.extent[3] % 8 == 0 && d.col_phase % 8 == 0; }

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

uint64_t pack_tiles(const PackDesc& d, const TileUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad) {
  const Matrix matrix = matrix_of(d);
  uint64_t sum = 0;
  for (int64_t idx = 0; idx < unit.num_tiles(); ++idx) {
    Tile tile = load_tile(matrix, unit, idx, true, k);
    if (!tile.finite) {
      bad->report(unit.desc, first_nonfinite(matrix, unit));
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

// Matrices whose words straddle rows or blocks are digested from the bucket, after all of it is written.
uint64_t digest_uncounted(const PackDesc* descs, size_t num_descs, const uint8_t* dst_base, int num_threads, Isa isa) {
  uint64_t sum = 0;
  for (size_t i = 0; i < num_descs; ++i) {
    const PackDesc& d = descs[i];
    if (!is_fp8(d) || counted_in_tiles(d)) continue;
    const auto nbytes = static_cast<size_t>(d.extent[2] * d.extent[3]);
    sum += digest(dst_base + d.dst_offset, nbytes, d.wire_word, num_threads, isa);
  }
  return sum;
}

}  // namespace

uint64_t pack(const PackDesc* descs, size_t num_descs, uint8_t* dst_base, int num_threads, Isa isa, FirstBad* bad) {
  const Kernels& k = kernels_for(isa);
  std::vector<RowUnit> rows;
  std::vector<TileUnit> tiles;
  for (size_t i = 0; i < num_descs; ++i) {
    if (is_fp8(descs[i])) {
      append_units(matrix_of(descs[i]), i, &tiles);
      continue;
    }
    const int64_t numel = box_of(descs[i]).numel();
    for (int64_t at = 0; at < numel; at += kUnitElems) rows.push_back({i, at, std::min(numel, at + kUnitElems)});
  }
  std::atomic<uint64_t> sum{0};
  parallel_for(tiles.size() + rows.size(), num_threads, [&](size_t i) {
    uint64_t part = 0;
    if (i < tiles.size()) {
      part = pack_tiles(descs[tiles[i].desc], tiles[i], dst_base, k, bad);
    } else {
      const RowUnit& unit = rows[i - tiles.size()];
      const PackDesc& d = descs[unit.desc];
      uint32_t max_bits = 0;
      part = pack_rows(d, unit, dst_base, k, &max_bits);
      if (max_bits >= nonfinite_bits(d)) report_row(d, unit, bad);
    }
    k.fence();
    sum.fetch_add(part, std::memory_order_relaxed);
  });
  return sum.load() + digest_uncounted(descs, num_descs, dst_base, num_threads, isa);
}

}  // namespace wsync
