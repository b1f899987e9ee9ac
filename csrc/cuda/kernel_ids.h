// The number of every kernel, as programs name them.
#pragma once

#include <cstdint>

#include "core/descriptors.h"

namespace wsync {
namespace cuda {

// Those marked with a star come once for each of the four sources: add source_idx(src_dtype).
enum Kernel : int32_t {
  kPackBlock = 0,           // *
  kPackChannel = 4,         // *
  kPackTensor = 8,          // *
  kPackChannelScaled = 12,  // *
  kPackMxfp8 = 16,          // *
  kPackNvfp4 = 20,          // *
  kCellScales = 24,
  kPackWords = 25,
  kMoveCopy = 26,
  kMoveFill = 27,
  kMoveDigest = 28,
  kRoundF32 = 29,
  kRoundF16 = 30,
  kUnpackWords = 31,
  kAmaxElements = 32,
  kAmaxVectors16 = 33,  // elements of 16 bits
  kAmaxVectors32 = 34,
  kScales = 35,
  kDequantise8 = 36,  // to bf16; the next two to f16 and f32
  kDequantise4 = 39,
  kDequantiseElements = 42,
  kRequantise = 43,
  kRequantiseElements = 44,
  kNumKernels = 45,
};

// Position of a source among bf16, f32, f16, f32 as given.
inline int32_t source_idx(int32_t src_dtype) { return src_dtype - kSrcBf16; }

}  // namespace cuda
}  // namespace wsync
