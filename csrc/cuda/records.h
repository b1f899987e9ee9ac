// What the host prepares for the kernels when a program is compiled, and what they report. A replay reuses it.
//
// A descriptor becomes a record (itself, with what would be computed again and again), and its work becomes units that
// the blocks of a persistent grid take turns at. Many small tensors are one launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/descriptors.h"
#include "core/dtype.h"

namespace wsync {
namespace cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr int kVectorElems = 16;  // the elements of one e4m3 store of 16 bytes
constexpr int kMxGroup = 32;
constexpr int kNvGroup = 16;

// Division of numbers below 2^31 by a constant: one multiplication. Source: Granlund and Montgomery, Division by
// invariant integers using multiplication, figure 4.1.
struct FastDiv {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;
};

inline FastDiv fast_div(uint32_t divisor) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - divisor;
  return {divisor, static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
}

// The first bad element as one number whose order is that of (descriptor, element).
constexpr int kElementBits = 40;
constexpr uint64_t kNoBadKey = ~uint64_t{0};

WSYNC_HD uint64_t bad_key(uint32_t desc_idx, uint64_t element) {
  return static_cast<uint64_t>(desc_idx) << kElementBits | element;
}

// Where kernels add their digests, and the least bad_key. The host sets it to {0, kNoBadKey}.
struct Result {
  unsigned long long digest;
  unsigned long long bad;
};

// One turn of a block. What x, y and n count depends on the kernel.
struct Unit {
  uint32_t record;
  uint32_t x;
  uint32_t y;
  uint32_t n;
};

// A packing descriptor.
struct PackRecord {
  PackDesc d;
  uint32_t desc_idx;
  uint32_t team;            // warps that share a row (fp8_channel)
  FastDiv vectors_per_row;  // vectors of kVectorElems
  uint32_t cells_per_row;   // scales in a row of scale blocks
};
static_assert(sizeof(PackRecord) == 160, "PackRecord");

struct UnpackRecord {
  UnpackDesc d;
  uint32_t desc_idx;
  int32_t installed;  // only the digest of what lies at the destination
};
static_assert(sizeof(UnpackRecord) == 144, "UnpackRecord");

// An amax descriptor, cut into rectangles that belong to one cell each: scale blocks, parts of rows, or bands.
struct AmaxRecord {
  AmaxDesc d;
  uint32_t desc_idx;
  int32_t rect_rows;
  int32_t rect_cols;
  uint32_t cells_per_row;  // of scales_from_amax
};
static_assert(sizeof(AmaxRecord) == 104, "AmaxRecord");

struct TransformRecord {
  TransformDesc d;
  uint32_t desc_idx;
  FastDiv vectors_per_row;  // vectors of 16 bytes of codes
};
static_assert(sizeof(TransformRecord) == 136, "TransformRecord");

constexpr int kMoveDims = 3;  // outer dimensions of a move; the innermost one is a contiguous run

// Bytes from one strided box to another, in vectors of 16 bytes at the destination along runs that are contiguous on
// both sides.
struct MoveRecord {
  uint64_t src;
  uint64_t dst;
  int64_t src_stride[kMoveDims];  // bytes, outer to inner
  int64_t dst_stride[kMoveDims];
  uint64_t wire_word;
  FastDiv run;                    // vectors of one run
  FastDiv extent[kMoveDims - 1];  // of the two inner ones of the outer dimensions
  // A word of the payload is bad if ((word & mask) + bias) & test; [1] is for the odd words of 32 bits.
  uint32_t mask[2];
  uint32_t bias[2];
  uint32_t test;
  uint32_t fill;  // the word that kUnpackFill repeats
  uint32_t desc_idx;
  int32_t elem_bytes;  // of the source
  int32_t src_dtype;   // of the values that are checked
  int32_t src_based;   // whether src (dst) is an offset from the launch's base
  int32_t dst_based;
  int32_t counted;  // whether the digest includes it
  uint32_t padding;
};
static_assert(sizeof(MoveRecord) == 160, "MoveRecord");

}  // namespace cuda
}  // namespace wsync
