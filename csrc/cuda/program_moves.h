// Boxes that are moved in 16-byte vectors.
#pragma once

#include <cstdint>

#include "cuda/program.h"

namespace wsync {
namespace cuda {

// Elements moved from one strided box to another of the same extents.
struct MoveBox {
  uint64_t src;  // an address, or an offset from the bucket (whose base is aligned to 16 bytes)
  uint64_t dst;
  const int64_t* src_stride;  // elements, kNumDims of them; null: packed
  const int64_t* dst_stride;
  const int64_t* extent;
  int64_t src_bytes;  // of an element
  int64_t dst_bytes;
};

// Fills addresses, strides and extents of `record` and returns its vectors, or 0 where a run on either side is not
// contiguous or not made of `src_vector` and 16 bytes. Dimensions that lie contiguously on both sides are merged.
uint64_t plan_move(const MoveBox& box, int64_t src_vector, MoveRecord* record);

// Elements of a box of kNumDims dimensions.
uint64_t num_elements(const int64_t* extent);

constexpr uint32_t kMoveStep = 16 << 10;  // vectors of a unit: 256 KiB

}  // namespace cuda
}  // namespace wsync
