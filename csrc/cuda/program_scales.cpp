// Programs of amaxes, of the scales made from them, and of transforms.
#include <algorithm>

#include "cuda/program.h"
#include "cuda/program_checks.h"

namespace wsync {
namespace cuda {
namespace {

constexpr const char* kAmax = "AMAX_DESC";
constexpr const char* kTransform = "TRANSFORM_DESC";
constexpr int32_t kPartCols = 16 << 10;   // columns of a rectangle that is no scale block
constexpr int64_t kPartElems = 64 << 10;  // elements of one of a whole box
constexpr uint32_t kCellStep = 1 << 10;
constexpr uint32_t kVectorStep = 8 << 10;
constexpr uint32_t kElementStep = 64 << 10;

bool in_grid(int32_t op) { return op == kOpFp8Block128 || op == kOpFp8Block128F32 || op == kOpFp8Scaled; }

uint32_t parts(int32_t phase, int64_t extent, int32_t size) {
  return static_cast<uint32_t>((phase + extent + size - 1) / size);
}

uint64_t numel(const int64_t (&extent)[2]) {
  return static_cast<uint64_t>(extent[0]) * static_cast<uint64_t>(extent[1]);
}

AmaxRecord amax_record(const AmaxDesc& d, size_t i) {
  AmaxRecord record{};
  record.d = d;
  record.desc_idx = static_cast<uint32_t>(i);
  record.rect_rows = record.rect_cols = static_cast<int32_t>(kScaleBlock);
  if (!in_grid(d.recipe_op)) {
    const int64_t cols = std::min<int64_t>(d.extent[1], kPartCols);
    record.rect_cols = kPartCols;
    record.rect_rows = d.recipe_op == kOpFp8Channel ? 1 : static_cast<int32_t>(std::max<int64_t>(1, kPartElems / cols));
  }
  return record;
}

Kernel amax_kernel_of(const AmaxDesc& d) {
  const int64_t elem_bytes = source_bytes(d.src_dtype);
  const bool vectors = d.src_stride[1] == 1 && is_vector(d.src) && is_vector(d.extent[1] * elem_bytes) &&
                       (d.extent[0] == 1 || is_vector(d.src_stride[0] * elem_bytes)) &&
                       (!in_grid(d.recipe_op) || is_vector(d.col_phase * elem_bytes));
  if (!vectors) return kAmaxElements;
  return elem_bytes == 2 ? kAmaxVectors16 : kAmaxVectors32;
}

void add_amax(const AmaxDesc& d, size_t i, Builder* builder) {
  if (numel(d.extent) == 0) return;
  check_aligned(kAmax, i, "src", d.src, source_bytes(d.src_dtype));
  check_aligned(kAmax, i, "amax", d.amax, 4);
  check_index(kAmax, i, numel(d.extent), "elements");
  const AmaxRecord record = amax_record(d, i);
  const Kernel kernel = amax_kernel_of(d);
  const uint32_t idx = builder->add_record(kernel, record);
  const bool grid = in_grid(d.recipe_op);
  const uint32_t rows = parts(grid ? d.row_phase : 0, d.extent[0], record.rect_rows);
  const uint32_t cols = parts(grid ? d.col_phase : 0, d.extent[1], record.rect_cols);
  for (uint32_t y = 0; y < rows; ++y) {
    for (uint32_t x = 0; x < cols; ++x) builder->add_unit(kernel, {idx, x, y, 1});
  }
}

void add_scales(const AmaxDesc& d, size_t i, Builder* builder) {
  if (numel(d.extent) == 0) return;
  check_aligned(kAmax, i, "amax", d.amax, 4);
  check_aligned(kAmax, i, "scales", d.scales, 4);
  AmaxRecord record = amax_record(d, i);
  uint64_t rows = d.recipe_op == kOpFp8Channel ? static_cast<uint64_t>(d.extent[0]) : 1;
  record.cells_per_row = 1;
  if (in_grid(d.recipe_op)) {
    rows = parts(d.row_phase, d.extent[0], kScaleBlock);
    record.cells_per_row = parts(d.col_phase, d.extent[1], kScaleBlock);
  }
  check_index(kAmax, i, rows * record.cells_per_row, "scales");
  builder->add_range(kScales, builder->add_record(kScales, record), rows * record.cells_per_row, kCellStep);
}

int64_t code_bytes(const TransformDesc& d) { return d.recipe_op == kOpNvfp4 ? d.extent[1] / 2 : d.extent[1]; }

// Codes and destination in vectors of 16 bytes, and no half of a vector across the border of a scale.
bool has_vectors(const TransformDesc& d, int64_t dst_bytes) {
  return is_vector(d.codes) && is_vector(code_bytes(d)) && is_vector(d.dst) && d.dst_stride[1] == 1 &&
         (d.extent[0] == 1 || (is_vector(d.code_stride) && is_vector(d.dst_stride[0] * dst_bytes))) &&
         (!in_grid(d.recipe_op) || d.col_phase % (kVectorElems / 2) == 0);
}

void add_dequantise(const TransformRecord& record, Builder* builder) {
  const TransformDesc& d = record.d;
  if (!has_vectors(d, source_bytes(d.dst_dtype))) {
    const uint32_t idx = builder->add_record(kDequantiseElements, record);
    return builder->add_range(kDequantiseElements, idx, numel(d.extent), kElementStep);
  }
  const int dst = d.dst_dtype == kSrcBf16 ? 0 : (d.dst_dtype == kSrcF16 ? 1 : 2);
  const auto kernel = static_cast<Kernel>((d.recipe_op == kOpNvfp4 ? kDequantise4 : kDequantise8) + dst);
  const auto vectors = static_cast<uint64_t>(d.extent[0] * code_bytes(d) / 16);
  builder->add_range(kernel, builder->add_record(kernel, record), vectors, kVectorStep);
}

void add_requantise(const TransformRecord& record, Builder* builder) {
  const TransformDesc& d = record.d;
  const Kernel kernel = has_vectors(d, 1) ? kRequantise : kRequantiseElements;
  const uint32_t idx = builder->add_record(kernel, record);
  const uint32_t rows = parts(0, d.extent[0], kScaleBlock);
  const uint32_t cols = parts(0, d.extent[1], kScaleBlock);
  for (uint32_t y = 0; y < rows; ++y) {
    for (uint32_t x = 0; x < cols; ++x) builder->add_unit(kernel, {idx, x, y, 1});
  }
}

void check_for_cuda(const TransformDesc& d, size_t i) {
  const bool byte_scales = d.recipe_op == kOpMxfp8 || d.recipe_op == kOpNvfp4;
  if (!byte_scales) check_aligned(kTransform, i, "scales", d.scales, 4);
  if (d.recipe_op == kOpNvfp4) check_aligned(kTransform, i, "tensor_scale", d.tensor_scale, 4);
  if (d.op == kTransformDequantise) check_aligned(kTransform, i, "dst", d.dst, source_bytes(d.dst_dtype));
  if (d.op == kTransformRequantE8m0) check_aligned(kTransform, i, "dst_scales", d.dst_scales, 4);
  check_index(kTransform, i, numel(d.extent), "weights");
}

void add_transform(const TransformDesc& d, size_t i, Builder* builder) {
  if (numel(d.extent) == 0) return;
  check_for_cuda(d, i);
  TransformRecord record{};
  record.d = d;
  record.desc_idx = static_cast<uint32_t>(i);
  record.vectors_per_row = fast_div(static_cast<uint32_t>(std::max<int64_t>(1, code_bytes(d) / 16)));
  if (d.dst_dtype == kSrcF32Exact) record.d.dst_dtype = kSrcF32;
  if (d.op == kTransformDequantise) {
    add_dequantise(record, builder);
  } else {
    add_requantise(record, builder);
  }
}

template <typename Desc, typename Add>
Program program_of(const char* name, const Desc* descs, size_t num_descs, Add add) {
  check_count(name, num_descs);
  Builder builder;
  for (size_t i = 0; i < num_descs; ++i) add(descs[i], i, &builder);
  return builder.build();
}

}  // namespace

Program amax_program(const AmaxDesc* descs, size_t num_descs) { return program_of(kAmax, descs, num_descs, add_amax); }

Program scales_program(const AmaxDesc* descs, size_t num_descs) {
  return program_of(kAmax, descs, num_descs, add_scales);
}

Program transform_program(const TransformDesc* descs, size_t num_descs) {
  return program_of(kTransform, descs, num_descs, add_transform);
}

}  // namespace cuda
}  // namespace wsync
