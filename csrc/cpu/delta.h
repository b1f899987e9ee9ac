// Delta of a bucket: what changed in its bytes since a base version, as docs/wire_format.md describes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace wsync {

constexpr uint32_t kDeltaMagic = 0x31445357;  // "WSD1"
constexpr size_t kDeltaHeaderBytes = 32;
constexpr size_t kDeltaEntryBytes = 12;
constexpr size_t kStripeParamBytes = 16;
constexpr uint32_t kStripeAlign = 256;           // spans are multiples of it
constexpr uint32_t kMaxStripeBytes = 512 << 10;  // bounds the working memory of a thread

enum StripeKind : uint8_t { kStripeSame = 0, kStripeRaw = 1, kStripeWords = 2, kStripeBytes = 3 };

constexpr int kGapClasses = 8;
constexpr int kStepClasses = 16;
constexpr int kMaxGapParam = 20;
constexpr int kAllOnes = 15;  // a step parameter: every step of the class is one
constexpr int kMaxUnary = 24;

// A stretch of a bucket that is encoded on its own, as elements of one size.
struct DeltaCut {
  uint32_t span;  // bytes, a multiple of kStripeAlign, at most kMaxStripeBytes
  uint32_t kind;  // kStripeWords or kStripeBytes
};

struct DeltaChange {
  uint32_t next_gap;  // to the next change of the class
  int32_t step;
  uint8_t gap_class;
  uint8_t step_class;
};

// Where and what the header says that a delta belongs to.
struct DeltaBase {
  uint64_t seq;
  uint64_t digest;
};

struct DeltaResult {
  uint64_t num_bytes;    // of the code; 0: it would not be smaller than the bucket
  uint64_t num_changed;  // elements
  uint64_t num_elements;
};

// The loops over one stripe, once for each instruction set; the same bits from all.
struct DeltaKernels {
  // Makes `base` what `fresh` is and writes the code of at most `span` bytes to `out`, which has room for 32 more.
  // Returns its size: 0 where nothing changed, `span` where it does not pay (then `out` and `base` are unspecified).
  size_t (*encode)(StripeKind kind, const uint8_t* fresh, uint8_t* base, size_t span, uint8_t* out,
                   std::vector<DeltaChange>* changes, uint8_t* top, uint64_t* num_changed);
  // Applies a code to `base`. Returns what is wrong with it, or null. Writes only inside the stripe, whatever it reads.
  const char* (*apply)(StripeKind kind, uint8_t* base, size_t span, const uint8_t* code, size_t size, uint8_t top);
};

const DeltaKernels& delta_kernels_for(Isa isa);
const DeltaKernels& scalar_delta_kernels();
#if defined(__x86_64__)
const DeltaKernels& avx2_delta_kernels();
const DeltaKernels& avx512_delta_kernels();
#endif

// Encodes the bucket `fresh` against `base`, and makes `base` the same as `fresh`. `out` has room for the bucket.
DeltaResult delta_encode(const uint8_t* fresh, uint8_t* base, uint8_t* out, const DeltaCut* cuts, size_t num_cuts,
                         DeltaBase from, int num_threads, Isa isa);

// Turns the bucket `bucket` of `used_bytes` from the version `from` into the encoded one. Throws WireError where the
// code is malformed or of another base; the bucket is of no known version then.
void delta_apply(uint8_t* bucket, uint64_t used_bytes, const uint8_t* code, uint64_t num_bytes, DeltaBase from,
                 int num_threads, Isa isa);

}  // namespace wsync
