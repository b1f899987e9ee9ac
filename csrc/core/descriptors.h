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
  kOpFp8Scaled = 4,         // block128 with scales that the table holds
  kOpFp8Channel = 5,        // whole rows
  kOpFp8ChannelScaled = 6,  // rows that an edge cuts: the table holds their scales
  kOpFp8Tensor = 7,         // reads `amax`
  kOpMxfp8 = 8,
  kOpNvfp4 = 9,  // reads `amax`; two codes a byte
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
  uint64_t amax;
  int32_t row_phase;
  int32_t col_phase;
  int32_t op;
  int32_t src_dtype;
  int32_t elem_bytes;
  int32_t piece_idx;
};
static_assert(sizeof(PackDesc) == 136, "PACK_DESC");
static_assert(offsetof(PackDesc, extent) == 40 && offsetof(PackDesc, dst_offset) == 72, "PACK_DESC");
static_assert(offsetof(PackDesc, scales) == 88 && offsetof(PackDesc, amax) == 104, "PACK_DESC");
static_assert(offsetof(PackDesc, row_phase) == 112 && offsetof(PackDesc, piece_idx) == 132, "PACK_DESC");

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

enum UnpackOp : int32_t {
  kUnpackCopy = 0,
  kUnpackFill = 1,
  kUnpackExponent = 2,
};

struct UnpackDesc {
  uint64_t dst;
  int64_t dst_stride[kNumDims];
  int64_t src_stride[kNumDims];
  int64_t extent[kNumDims];
  uint64_t src_offset;
  uint64_t wire_word;
  int32_t elem_bytes;
  int32_t piece_idx;
  int32_t op;
  uint32_t fill;
};
static_assert(sizeof(UnpackDesc) == 136, "UNPACK_DESC");
static_assert(offsetof(UnpackDesc, src_stride) == 40 && offsetof(UnpackDesc, src_offset) == 104, "UNPACK_DESC");
static_assert(offsetof(UnpackDesc, elem_bytes) == 120 && offsetof(UnpackDesc, fill) == 132, "UNPACK_DESC");

enum TransformOp : int32_t {
  kTransformDequantise = 0,
  kTransformRequantE8m0 = 1,
};

struct TransformDesc {
  uint64_t codes;
  int64_t code_stride;
  int64_t extent[2];
  uint64_t scales;
  int64_t scale_stride;
  uint64_t tensor_scale;
  uint64_t dst;
  int64_t dst_stride[2];
  uint64_t dst_scales;
  int64_t dst_scale_stride;
  int32_t row_phase;
  int32_t col_phase;
  int32_t recipe_op;
  int32_t op;
  int32_t dst_dtype;
  int32_t piece_idx;
};
static_assert(sizeof(TransformDesc) == 120, "TRANSFORM_DESC");
static_assert(offsetof(TransformDesc, scales) == 32 && offsetof(TransformDesc, dst) == 56, "TRANSFORM_DESC");
static_assert(offsetof(TransformDesc, row_phase) == 96 && offsetof(TransformDesc, piece_idx) == 116, "TRANSFORM_DESC");

}  // namespace wsync
