#include "cpu/delta_stripe.h"

namespace wsync {
namespace {

struct ScalarMasks {
  template <int kBytes>
  static void masks(const uint8_t* base, const uint8_t* fresh, int top, GroupMasks* found) {
    *found = {};
    for (int i = 0; i < 64; ++i) {
      uint16_t from = 0, to = 0;
      std::memcpy(&from, base + kBytes * i, kBytes);
      std::memcpy(&to, fresh + kBytes * i, kBytes);
      found->changed |= static_cast<uint64_t>(from != to) << i;
      const int exponent = kBytes == 2 ? (from & 0x7fff) >> 7 : (from & 0x7f) >> 3;
      const auto c = static_cast<uint64_t>(clamp_class(exponent - top + kGapClasses - 1, kGapClasses));
      for (int b = 0; b < 3; ++b) found->plane[b] |= ((c >> b) & 1) << i;
    }
  }

  static void count(const GroupMasks& masks, uint32_t* counts) { count_members(masks, counts); }

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
