// Descriptors: the records that wsync/plan/descriptors.py builds and every backend executes. The byte layout is the
// contract; a test compares sizes and offsets with the numpy dtypes field by field.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wsync {

constexpr int kNumDims = 4;
constexpr int64_t kScaleBlock = 128;

enum Op : int32_t {
  kOpCopy = 0,  // bytes as they are; values of a float src_dtype must be finite
  kOpBf16 = 1,
  kOpFp8Block128 = 2,
  kOpFp8Block128F32 = 3,
  kOpFp8Scaled = 4,
};

enum SrcDtype : int32_t {
  kSrcBytes = 0,
  kSrcBf16 = 1,
  kSrcF32 = 2,       // rounded to bf16 (RNE) before anything else
  kSrcF16 = 3,       // as given, through an exact conversion to f32
  kSrcF32Exact = 4,  // as given
  kSrcF64 = 5,       // of copies only
};

// Bytes of one element, or 0 for kSrcBytes, which may have any.
inline int32_t source_bytes(int32_t src_dtype) {
  switch (src_dtype) {
    case kSrcBf16:
    case kSrcF16:
      return 2;
    case kSrcF32:
    case kSrcF32Exact:
      return 4;
    case kSrcF64:
      return 8;
    default:
      return 0;
  }
}

// A wire_word of this value means: copy, but leave out of the digest.
constexpr uint64_t kUncountedWord = ~uint64_t{0};

struct PackDesc {
  uint64_t src;
  int64_t src_stride[kNumDims];
  int64_t extent[kNumDims];
  uint64_t dst_offset;
  uint64_t wire_word;
  uint64_t scales;
  int64_t scale_stride;
  int32_t row_phase;
  int32_t col_phase;
  int32_t op;
  int32_t src_dtype;
  int32_t elem_bytes;
  int32_t piece_idx;
};
static_assert(sizeof(PackDesc) == 128, "PACK_DESC");
static_assert(offsetof(PackDesc, extent) == 40 && offsetof(PackDesc, dst_offset) == 72, "PACK_DESC");
static_assert(offsetof(PackDesc, scales) == 88 && offsetof(PackDesc, row_phase) == 104, "PACK_DESC");
static_assert(offsetof(PackDesc, op) == 112 && offsetof(PackDesc, piece_idx) == 124, "PACK_DESC");

struct AmaxDesc {
  uint64_t src;
  int64_t src_stride[2];
  int64_t extent[2];
  uint64_t amax;
  int64_t amax_stride;
  uint64_t scales;
  int64_t scale_stride;
  int32_t row_phase;
  int32_t col_phase;
  int32_t src_dtype;
  int32_t recipe_op;
};
static_assert(sizeof(AmaxDesc) == 88, "AMAX_DESC");
static_assert(offsetof(AmaxDesc, amax) == 40 && offsetof(AmaxDesc, row_phase) == 72, "AMAX_DESC");

struct UnpackDesc {
  uint64_t dst;
  int64_t dst_stride[kNumDims];
  int64_t extent[kNumDims];
  uint64_t src_offset;
  uint64_t wire_word;
  int32_t elem_bytes;
  int32_t piece_idx;
};
static_assert(sizeof(UnpackDesc) == 96, "UNPACK_DESC");
static_assert(offsetof(UnpackDesc, src_offset) == 72 && offsetof(UnpackDesc, elem_bytes) == 88, "UNPACK_DESC");

}  // namespace wsync
