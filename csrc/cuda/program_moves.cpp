#include "cuda/program_moves.h"

#include "cuda/program_checks.h"

namespace wsync {
namespace cuda {
namespace {

// Dimensions, outer to inner, merged where both sides allow it. Strides are bytes.
struct Merged {
  int num_dims = 0;
  int64_t extent[kNumDims];
  int64_t src[kNumDims];
  int64_t dst[kNumDims];
};

Merged merge(const MoveBox& box) {
  Merged inner_first;
  int64_t packed = 1;
  for (int d = kNumDims - 1; d >= 0; --d) {
    const int64_t n = box.extent[d];
    const int64_t src = (box.src_stride == nullptr ? packed : box.src_stride[d]) * box.src_bytes;
    const int64_t dst = (box.dst_stride == nullptr ? packed : box.dst_stride[d]) * box.dst_bytes;
    packed *= n;
    if (n == 1) continue;
    const int last = inner_first.num_dims - 1;
    if (last >= 0 && src == inner_first.src[last] * inner_first.extent[last] &&
        dst == inner_first.dst[last] * inner_first.extent[last]) {
      inner_first.extent[last] *= n;
      continue;
    }
    inner_first.extent[last + 1] = n;
    inner_first.src[last + 1] = src;
    inner_first.dst[last + 1] = dst;
    ++inner_first.num_dims;
  }
  return inner_first;
}

}  // namespace

uint64_t num_elements(const int64_t* extent) {
  uint64_t numel = 1;
  for (int d = 0; d < kNumDims; ++d) numel *= static_cast<uint64_t>(extent[d]);
  return numel;
}

uint64_t plan_move(const MoveBox& box, int64_t src_vector, MoveRecord* record) {
  const Merged merged = merge(box);
  const int64_t run = merged.num_dims == 0 ? 1 : merged.extent[0];
  if (merged.num_dims > 0 && (merged.src[0] != box.src_bytes || merged.dst[0] != box.dst_bytes)) return 0;
  if (run * box.dst_bytes % 16 != 0 || run * box.src_bytes % src_vector != 0) return 0;
  if (!is_vector(box.src) || !is_vector(box.dst)) return 0;
  record->src = box.src;
  record->dst = box.dst;
  int64_t extent[kMoveDims] = {1, 1, 1};
  for (int d = 1; d < merged.num_dims; ++d) {
    if (!is_vector(merged.src[d]) || !is_vector(merged.dst[d])) return 0;
    const int at = kMoveDims - d;
    extent[at] = merged.extent[d];
    record->src_stride[at] = merged.src[d];
    record->dst_stride[at] = merged.dst[d];
  }
  const uint64_t vectors = num_elements(box.extent) * static_cast<uint64_t>(box.dst_bytes) / 16;
  if (vectors > kMaxIndex) return 0;
  record->run = fast_div(static_cast<uint32_t>(run * box.dst_bytes / 16));
  record->extent[0] = fast_div(static_cast<uint32_t>(extent[1]));
  record->extent[1] = fast_div(static_cast<uint32_t>(extent[2]));
  return vectors;
}

}  // namespace cuda
}  // namespace wsync
