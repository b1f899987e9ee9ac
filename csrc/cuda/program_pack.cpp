// Programs of packing.
#include <algorithm>

#include "core/dtype.h"
#include "cuda/program_checks.h"
#include "cuda/program_moves.h"

namespace wsync {
namespace cuda {
namespace {

constexpr const char* kName = "PACK_DESC";
constexpr uint32_t kWordStep = 16 << 10;
constexpr uint32_t kCellStep = 256;
constexpr uint32_t kRowStep = 16 << 10;  // vectors of a unit; a multiple of a warp's window
constexpr int64_t kTeamCols = 2048;      // columns of a warp's window in fp8_channel

bool in_blocks(int32_t op) { return op == kOpFp8Block128 || op == kOpFp8Block128F32 || op == kOpFp8Scaled; }

int64_t blocks(int32_t phase, int64_t extent) { return (phase + extent + kScaleBlock - 1) / kScaleBlock; }

// Which words of a copy hold a value that is not finite: MoveRecord::mask and its neighbours.
void set_checks(int32_t src_dtype, MoveRecord* m) {
  const auto set = [m](uint32_t mask, uint32_t bias, uint32_t test) {
    m->mask[0] = m->mask[1] = mask;
    m->bias[0] = m->bias[1] = bias;
    m->test = test;
  };
  switch (src_dtype) {
    case kSrcBf16:
      return set(0x7fff7fffu, (0x8000u - kBf16Infinity) * 0x10001u, 0x80008000u);
    case kSrcF16:
      return set(0x7fff7fffu, (0x8000u - kF16Infinity) * 0x10001u, 0x80008000u);
    case kSrcF32Exact:
      return set(0x7fffffffu, 0x80000000u - kF32Infinity, 0x80000000u);
    case kSrcF64:
      set(0x7fffffffu, 0x80000000u - kF64InfinityHigh, 0x80000000u);
      m->mask[0] = m->bias[0] = 0;
      return;
    default:
      return;
  }
}

uint64_t plan_elements(const PackDesc& d, bool rounds, MoveRecord* m) {
  MoveBox box{};
  box.src = d.src;
  box.src_stride = d.src_stride;
  box.dst = d.dst_offset;
  box.extent = d.extent;
  box.src_bytes = d.elem_bytes;
  box.dst_bytes = d.op == kOpCopy ? d.elem_bytes : 2;
  m->dst_based = 1;
  m->wire_word = d.wire_word;
  m->counted = 1;
  m->elem_bytes = d.elem_bytes;
  m->src_dtype = rounds && d.src_dtype == kSrcF32Exact ? static_cast<int32_t>(kSrcF32) : d.src_dtype;
  set_checks(m->src_dtype, m);
  return plan_move(box, rounds ? 16 * d.elem_bytes : 16, m);
}

bool add_elements(const PackDesc& d, uint32_t idx, Builder* builder) {
  const bool rounds = d.op == kOpBf16 && d.src_dtype != kSrcBf16;
  MoveRecord m{};
  m.desc_idx = idx;
  const uint64_t vectors = plan_elements(d, rounds, &m);
  if (vectors == 0) return false;
  const Kernel kernel = !rounds ? kMoveCopy : (d.src_dtype == kSrcF16 ? kRoundF16 : kRoundF32);
  builder->add_range(kernel, builder->add_record(kernel, m), vectors, kMoveStep);
  return true;
}

// Whether rows are made of vectors of 16 elements on 16-byte addresses. In fp8_channel a window that begins before the
// end of a row may count columns beyond it, in 31 bits.
bool has_vectors(const PackDesc& d) {
  constexpr int64_t kMostWindowed = kMaxIndex - kWarps * kTeamCols;
  const int64_t group = d.op == kOpNvfp4 ? 2 * kVectorElems : kVectorElems;
  if (d.op == kOpFp8Channel && d.extent[3] > kMostWindowed) return false;
  return (d.src_stride[3] == 1) && d.extent[3] % group == 0 && is_vector(d.src) &&
         (d.extent[2] == 1 || is_vector(d.src_stride[2] * d.elem_bytes)) && is_vector(d.dst_offset) &&
         (!in_blocks(d.op) || d.col_phase % kVectorElems == 0);
}

void add_blocks(const PackRecord& record, Builder* builder) {
  const PackDesc& d = record.d;
  const auto kernel = static_cast<Kernel>(kPackBlock + source_idx(d.src_dtype));
  const uint32_t idx = builder->add_record(kernel, record);
  const auto rows = static_cast<uint32_t>(blocks(d.row_phase, d.extent[2]));
  const auto cols = static_cast<uint32_t>(blocks(d.col_phase, d.extent[3]));
  for (uint32_t y = 0; y < rows; ++y) {
    for (uint32_t x = 0; x < cols; ++x) builder->add_unit(kernel, {idx, x, y, 1});
  }
}

void add_channels(PackRecord record, Builder* builder) {
  const PackDesc& d = record.d;
  record.team = 1;
  while (record.team < kWarps && record.team * kTeamCols < d.extent[3]) record.team *= 2;
  const auto kernel = static_cast<Kernel>(kPackChannel + source_idx(d.src_dtype));
  const uint32_t idx = builder->add_record(kernel, record);
  builder->add_range(kernel, idx, static_cast<uint64_t>(d.extent[2]), kWarps / record.team);
}

void add_rows(Kernel family, const PackRecord& record, Builder* builder) {
  const PackDesc& d = record.d;
  const auto kernel = static_cast<Kernel>(family + source_idx(d.src_dtype));
  const uint64_t vectors = num_elements(d.extent) / kVectorElems;
  builder->add_range(kernel, builder->add_record(kernel, record), vectors, kRowStep);
}

void add_vectors(const PackRecord& record, Builder* builder) {
  switch (record.d.op) {
    case kOpFp8Channel:
      return add_channels(record, builder);
    case kOpFp8ChannelScaled:
      return add_rows(kPackChannelScaled, record, builder);
    case kOpFp8Tensor:
      return add_rows(kPackTensor, record, builder);
    case kOpMxfp8:
      return add_rows(kPackMxfp8, record, builder);
    case kOpNvfp4:
      return add_rows(kPackNvfp4, record, builder);
    default:
      return add_blocks(record, builder);
  }
}

// Rows and columns of the table that the op writes, or zeros where it writes none.
void table_extents(const PackDesc& d, uint64_t* rows, uint64_t* cols) {
  *rows = static_cast<uint64_t>(d.extent[2]);
  *cols = 0;
  if (d.op == kOpMxfp8) *cols = static_cast<uint64_t>(d.extent[3] / kMxGroup);
  if (d.op == kOpNvfp4) *cols = static_cast<uint64_t>(d.extent[3] / kNvGroup);
  if (d.op == kOpFp8Channel) *cols = 1;
  if (d.op == kOpFp8Block128 || d.op == kOpFp8Block128F32) {
    *rows = static_cast<uint64_t>(blocks(d.row_phase, d.extent[2]));
    *cols = static_cast<uint64_t>(blocks(d.col_phase, d.extent[3]));
  }
}

void add_words(PackRecord record, Builder* builder) {
  const PackDesc& d = record.d;
  uint64_t rows = 0;
  uint64_t cols = 0;
  table_extents(d, &rows, &cols);
  record.cells_per_row = static_cast<uint32_t>(cols);
  if (cols != 0) {
    builder->add_range(kCellScales, builder->add_record(kCellScales, record), rows * cols, kCellStep);
  }
  const uint64_t numel = num_elements(d.extent);
  uint64_t num_bytes = numel;
  if (d.op == kOpCopy) num_bytes = numel * static_cast<uint64_t>(d.elem_bytes);
  if (d.op == kOpBf16) num_bytes = numel * 2;
  if (d.op == kOpNvfp4) num_bytes = numel / 2;
  builder->add_range(kPackWords, builder->add_record(kPackWords, record), (num_bytes + 7) / 8, kWordStep);
}

bool has_f32_scales(int32_t op) { return op >= kOpFp8Block128 && op <= kOpFp8ChannelScaled; }

void add(const PackDesc& d, size_t i, Builder* builder) {
  const uint64_t numel = num_elements(d.extent);
  if (numel == 0) return;
  check_aligned(kName, i, "src", d.src, d.elem_bytes);
  if (has_f32_scales(d.op)) check_aligned(kName, i, "scales", d.scales, 4);
  if (d.op == kOpFp8Tensor || d.op == kOpNvfp4) check_aligned(kName, i, "amax", d.amax, 4);
  check_index(kName, i, numel, "elements");
  const auto idx = static_cast<uint32_t>(i);
  PackRecord record{};
  record.d = d;
  record.desc_idx = idx;
  if (d.op == kOpCopy || d.op == kOpBf16) {
    if (!add_elements(d, idx, builder)) add_words(record, builder);
    return;
  }
  if (d.extent[2] == 1) record.d.src_stride[2] = 0;
  if (!has_vectors(d)) return add_words(record, builder);
  record.vectors_per_row = fast_div(static_cast<uint32_t>(d.extent[3] / kVectorElems));
  add_vectors(record, builder);
}

}  // namespace

Program pack_program(const PackDesc* descs, size_t num_descs) {
  check_count(kName, num_descs);
  Builder builder;
  for (size_t i = 0; i < num_descs; ++i) add(descs[i], i, &builder);
  Program program = builder.build();
  program.needs_base = !program.launches.empty();
  return program;
}

}  // namespace cuda
}  // namespace wsync
