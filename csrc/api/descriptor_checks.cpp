#include "api/descriptor_checks.h"

#include <algorithm>
#include <initializer_list>

#include "core/errors.h"
#include "cpu/kernels.h"

namespace wsync {
namespace {

constexpr const char* kPack = "PACK_DESC";
constexpr const char* kAmax = "AMAX_DESC";
constexpr const char* kUnpack = "UNPACK_DESC";
constexpr const char* kTransform = "TRANSFORM_DESC";

// No memory holds more, and products of extents stay far from overflowing.
constexpr int64_t kMaxElements = int64_t{1} << 60;

template <int kDims>
bool check_extents(const char* record, size_t index, const int64_t (&extent)[kDims]) {
  bool empty = false;
  for (const int64_t n : extent) {
    if (n < 0) refuse(record, index, "extent " + std::to_string(n) + " is negative");
    empty = empty || n == 0;
  }
  int64_t num_elements = 1;
  for (const int64_t n : extent) {
    if (!empty && (__builtin_mul_overflow(num_elements, n, &num_elements) || num_elements > kMaxElements)) {
      refuse(record, index, "its extents hold more than " + std::to_string(kMaxElements) + " elements");
    }
  }
  return !empty;
}

void check_elem_bytes(const char* record, size_t index, int32_t n) {
  if (n != 1 && n != 2 && n != 4 && n != 8) {
    refuse(record, index, "elem_bytes is " + std::to_string(n) + ", not one of 1, 2, 4, 8");
  }
}

void check_phases(const char* record, size_t index, int32_t row_phase, int32_t col_phase) {
  for (const int32_t phase : {row_phase, col_phase}) {
    if (phase < 0 || phase >= kScaleBlock)
      refuse(record, index, "phase " + std::to_string(phase) + " is outside 0..127");
  }
}

void check_float_source(const char* record, size_t index, int32_t src_dtype) {
  if (src_dtype < kSrcBf16 || src_dtype > kSrcF32Exact) {
    refuse(record, index, "src_dtype " + std::to_string(src_dtype) + " is not one of bf16, f32 and f16 (1..4)");
  }
}

// A copy keeps its bytes, so it knows no dtype that is rounded.
void check_copied_source(const char* record, size_t index, int32_t src_dtype) {
  if (src_dtype < kSrcBytes || src_dtype > kSrcF64 || src_dtype == kSrcF32) {
    refuse(record, index, "src_dtype " + std::to_string(src_dtype) + " cannot be copied (0, 1, 3, 4, 5)");
  }
}

void check_source_bytes(const char* record, size_t index, int32_t src_dtype, int32_t elem_bytes) {
  const int32_t expected = source_bytes(src_dtype);
  if (expected != 0 && elem_bytes != expected) {
    refuse(record, index,
           "elem_bytes is " + std::to_string(elem_bytes) + ", but src_dtype " + std::to_string(src_dtype) + " has " +
               std::to_string(expected));
  }
}

bool is_one_of(int32_t op, std::initializer_list<int32_t> ops) {
  return std::find(ops.begin(), ops.end(), op) != ops.end();
}

// 128 x 128 scale blocks.
bool has_blocks(int32_t op) { return is_one_of(op, {kOpFp8Block128, kOpFp8Block128F32, kOpFp8Scaled}); }

// Columns that are encoded together: a box has whole groups of them.
int64_t group_of(int32_t op) { return op == kOpMxfp8 ? kMxGroup : (op == kOpNvfp4 ? kNvGroup : 1); }

void check_groups(const char* record, size_t index, int32_t op, int64_t cols, int32_t col_phase) {
  const int64_t group = group_of(op);
  if (group == 1) return;
  for (const auto& [name, value] : {std::pair<const char*, int64_t>{"columns", cols}, {"col_phase", col_phase}}) {
    if (value % group == 0) continue;
    refuse(record, index,
           std::string(name) + " is " + std::to_string(value) + ", not a multiple of " + std::to_string(group) +
               ", which op " + std::to_string(op) + " encodes together");
  }
}

// Where the scales of a quantising box are, and what they are made from.
void check_scales(const PackDesc& d, size_t index) {
  const bool writes_or_reads_scales = d.op != kOpFp8Tensor;
  const bool reads_amax = d.op == kOpFp8Tensor || d.op == kOpNvfp4;
  if (writes_or_reads_scales && d.scales == 0) refuse(kPack, index, "scales is null");
  if (reads_amax && d.amax == 0) refuse(kPack, index, "amax is null");
}

}  // namespace

void refuse(const char* record, size_t index, const std::string& what) {
  throw Error("ConfigError", std::string(record) + "[" + std::to_string(index) + "]: " + what);
}

void check(const PackDesc& d, size_t i) {
  if (d.op < kOpCopy || d.op > kOpNvfp4) refuse(kPack, i, "op " + std::to_string(d.op) + " is unknown");
  check_elem_bytes(kPack, i, d.elem_bytes);
  const bool holds_elements = check_extents(kPack, i, d.extent);
  if (holds_elements && d.src == 0) refuse(kPack, i, "src is null");
  if (d.op == kOpCopy) {
    check_copied_source(kPack, i, d.src_dtype);
  } else {
    check_float_source(kPack, i, d.src_dtype);
  }
  check_source_bytes(kPack, i, d.src_dtype, d.elem_bytes);
  if (d.op == kOpCopy || d.op == kOpBf16) return;
  if (has_blocks(d.op)) check_phases(kPack, i, d.row_phase, d.col_phase);
  check_groups(kPack, i, d.op, d.extent[3], d.col_phase);
  if (!holds_elements) return;
  if (d.extent[0] != 1 || d.extent[1] != 1) refuse(kPack, i, "a quantised box has more than two dimensions");
  check_scales(d, i);
}

void check(const AmaxDesc& d, size_t i) {
  check_float_source(kAmax, i, d.src_dtype);
  if (!is_one_of(d.recipe_op, {kOpFp8Block128, kOpFp8Block128F32, kOpFp8Channel, kOpFp8Tensor, kOpNvfp4})) {
    refuse(kAmax, i,
           "recipe_op " + std::to_string(d.recipe_op) +
               " is not OP_FP8_BLOCK128, OP_FP8_BLOCK128_F32, OP_FP8_CHANNEL, OP_FP8_TENSOR or OP_NVFP4");
  }
  if (has_blocks(d.recipe_op)) check_phases(kAmax, i, d.row_phase, d.col_phase);
  if (check_extents(kAmax, i, d.extent) && (d.src == 0 || d.amax == 0)) refuse(kAmax, i, "src or amax is null");
}

void check(const UnpackDesc& d, size_t i) {
  check_elem_bytes(kUnpack, i, d.elem_bytes);
  if (d.op < kUnpackCopy || d.op > kUnpackExponent) refuse(kUnpack, i, "op " + std::to_string(d.op) + " is unknown");
  const auto elem_bytes = std::to_string(d.elem_bytes);
  if (d.op == kUnpackFill && d.elem_bytes > 4) {
    refuse(kUnpack, i, "elem_bytes is " + elem_bytes + ", but a fill has 4 bytes at most");
  }
  if (d.op == kUnpackExponent && d.elem_bytes != 1) {
    refuse(kUnpack, i, "elem_bytes is " + elem_bytes + ", but an exponent has 1");
  }
  if (check_extents(kUnpack, i, d.extent) && d.dst == 0) refuse(kUnpack, i, "dst is null");
}

void check(const TransformDesc& d, size_t i) {
  if (d.op != kTransformDequantise && d.op != kTransformRequantE8m0) {
    refuse(kTransform, i, "op " + std::to_string(d.op) + " is unknown");
  }
  if (d.recipe_op < kOpFp8Block128 || d.recipe_op > kOpNvfp4) {
    refuse(kTransform, i, "recipe_op " + std::to_string(d.recipe_op) + " does not quantise");
  }
  const bool requantises = d.op == kTransformRequantE8m0;
  if (requantises && !has_blocks(d.recipe_op)) {
    refuse(kTransform, i, "recipe_op " + std::to_string(d.recipe_op) + " has no 128 x 128 blocks to requantise");
  }
  if (requantises && (d.row_phase != 0 || d.col_phase != 0)) {
    refuse(kTransform, i,
           "phases " + std::to_string(d.row_phase) + ", " + std::to_string(d.col_phase) +
               ": requantised blocks are whole");
  }
  if (!requantises && !is_one_of(d.dst_dtype, {kSrcBf16, kSrcF16, kSrcF32, kSrcF32Exact})) {
    refuse(kTransform, i, "dst_dtype " + std::to_string(d.dst_dtype) + " is not one of bf16, f16 and f32 (1..4)");
  }
  if (has_blocks(d.recipe_op)) check_phases(kTransform, i, d.row_phase, d.col_phase);
  check_groups(kTransform, i, d.recipe_op, d.extent[1], d.col_phase);
  if (!check_extents(kTransform, i, d.extent)) return;
  if (d.codes == 0 || d.scales == 0 || d.dst == 0) refuse(kTransform, i, "codes, scales or dst is null");
  if (d.recipe_op == kOpNvfp4 && d.tensor_scale == 0) refuse(kTransform, i, "tensor_scale is null");
  if (requantises && d.dst_scales == 0) refuse(kTransform, i, "dst_scales is null");
}

}  // namespace wsync
