#include "cpu/delta_stripe.h"

namespace wsync {
namespace {

struct ScalarMasks {
  template <int kBytes>
  static void masks(const uint8_t* base, const uint8_t* fresh, const int16_t* limits, GroupMasks* found) {
    *found = {};
    found->from[0] = ~uint64_t{0};
    for (int i = 0; i < 64; ++i) {
      uint16_t from = 0, to = 0;
      std::memcpy(&from, base + kBytes * i, kBytes);
      std::memcpy(&to, fresh + kBytes * i, kBytes);
      found->changed |= static_cast<uint64_t>(from != to) << i;
      const int magnitude = from & (kBytes == 2 ? 0x7fff : 0x7f);
      for (int j = 0; j < kGapClasses - 1; ++j) {
        found->from[j + 1] |= static_cast<uint64_t>(magnitude > limits[j]) << i;
      }
    }
  }

  // The set bit of that rank, alone.
  static uint64_t select(uint64_t mask, uint64_t rank) {
    for (; rank > 0; --rank) mask &= mask - 1;
    return mask & (~mask + 1);
  }
};

}  // namespace

const DeltaKernels& scalar_delta_kernels() {
  static const DeltaKernels kernels{&encode_stripe<ScalarMasks>, &apply_stripe<ScalarMasks>};
  return kernels;
}

}  // namespace wsync
