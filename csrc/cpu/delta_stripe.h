// The code of one stripe: changes as gaps within classes of the base's exponent, and as steps between neighbouring
// codes. Included by one file for each instruction set, inside its target region: everything here is local to it.
//
// A small weight changes far more often than a large one at the same step of the optimizer, since its neighbours lie
// closer; both ends know the base, so both know the class of every element.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/delta.h"

namespace wsync {
namespace {

// Bit i of `changed`: element i of a group of 64 differs; bit i of plane[b]: bit b of its gap class is set.
struct GroupMasks {
  uint64_t changed;
  uint64_t plane[3];
};
static_assert(kGapClasses == 8, "a gap class has three bits");

// The elements of a group that are of class `c`.
inline uint64_t members(const GroupMasks& masks, int c) {
  const auto flip = [c](int b) { return static_cast<uint64_t>((c >> b) & 1) - 1; };
  return (masks.plane[0] ^ flip(0)) & (masks.plane[1] ^ flip(1)) & (masks.plane[2] ^ flip(2));
}

// How many elements of a group each class has, where the instruction set has nothing better.
inline void count_members(const GroupMasks& masks, uint32_t* counts) {
  for (int c = 0; c < kGapClasses; ++c) counts[c] = static_cast<uint32_t>(__builtin_popcountll(members(masks, c)));
}

class BitWriter {
 public:
  BitWriter(uint8_t* out, size_t room) : begin_(out), at_(out), end_(out + room) {}
  // At most 56 bits. Stores 8 bytes each time, whatever is new: no branch to mispredict.
  void put(uint64_t value, int count) {
    acc_ |= value << num_bits_;
    num_bits_ += count;
    std::memcpy(at_, &acc_, 8);
    at_ += num_bits_ >> 3;
    acc_ >>= num_bits_ & ~7;
    num_bits_ &= 7;
  }
  void put_rice(uint32_t value, int k) {
    const uint32_t q = value >> k;
    if (__builtin_expect(q >= kMaxUnary, 0)) {
      put(((uint64_t{1} << kMaxUnary) - 1) | static_cast<uint64_t>(value) << kMaxUnary, kMaxUnary + 32);
      return;
    }
    const uint64_t low = value & ((uint64_t{1} << k) - 1);
    put(((uint64_t{1} << q) - 1) | low << (q + 1), static_cast<int>(q) + 1 + k);
  }
  bool is_full() const { return at_ >= end_; }
  size_t finish() { return static_cast<size_t>(at_ - begin_) + (num_bits_ > 0 ? 1 : 0); }

 private:
  uint8_t* begin_;
  uint8_t* at_;
  uint8_t* end_;
  uint64_t acc_ = 0;
  int num_bits_ = 0;
};

// Reads zeros beyond the end, and says so.
class BitReader {
 public:
  BitReader(const uint8_t* code, size_t size) : at_(code), end_(code + size) {}
  uint32_t take(int count) {  // at most 32
    refill();
    if (count > num_bits_) {
      over_ = true;
      return 0;
    }
    const uint64_t value = acc_ & ((uint64_t{1} << count) - 1);
    acc_ >>= count;
    num_bits_ -= count;
    return static_cast<uint32_t>(value);
  }
  uint32_t take_rice(int k) {
    refill();
    const int ones = __builtin_ctzll(~acc_ | (uint64_t{1} << kMaxUnary));
    if (ones == kMaxUnary) {
      take(kMaxUnary);
      return take(32);
    }
    take(ones + 1);
    return (static_cast<uint32_t>(ones) << k) | take(k);
  }
  bool is_over() const { return over_; }
  // Whether everything was read but for the zeros that fill the last byte.
  bool is_spent() const { return !over_ && at_ == end_ && num_bits_ < 8 && acc_ == 0; }

 private:
  void refill() {
    if (num_bits_ > 32) return;
    if (end_ - at_ >= 4) {
      uint32_t more;
      std::memcpy(&more, at_, 4);
      acc_ |= static_cast<uint64_t>(more) << num_bits_;
      at_ += 4;
      num_bits_ += 32;
      return;
    }
    for (; at_ < end_ && num_bits_ <= 56; num_bits_ += 8) acc_ |= static_cast<uint64_t>(*at_++) << num_bits_;
  }

  const uint8_t* at_;
  const uint8_t* end_;
  uint64_t acc_ = 0;
  int num_bits_ = 0;
  bool over_ = false;
};

// The Rice parameter for values of that sum: the one that costs least where they are geometric.
inline int rice_param(uint64_t sum, uint64_t count, int most) {
  int k = 0;
  while (k < most && (count << (k + 1)) <= sum + count / 2) ++k;
  return count == 0 ? 0 : k;
}

inline int clamp_class(int value, int classes) { return std::min(std::max(value, 0), classes - 1); }

struct GapClass {
  uint64_t seen = 0;  // elements of the class before the group
  uint64_t next = 0;  // encoding: elements up to the last change; applying: number of the next change
};

template <class Simd, int kBytes>
class StripeCodec {
  static constexpr int kBits = 8 * kBytes;
  static constexpr int kMantissaBits = kBytes == 2 ? 7 : 3;
  static constexpr uint32_t kSign = 1u << (kBits - 1);
  static constexpr uint32_t kFull = (1u << kBits) - 1;
  // The largest weights are rare and hardly ever change: the topmost octaves of words share a class.
  static constexpr int kHeadroom = kBytes == 2 ? 3 : 0;
  static constexpr size_t kGroupBytes = 64 * kBytes;

  static uint32_t load(const uint8_t* stripe, size_t i) {
    if constexpr (kBytes == 1) return stripe[i];
    uint16_t value;
    std::memcpy(&value, stripe + 2 * i, 2);
    return value;
  }
  static void store(uint8_t* stripe, size_t i, uint32_t code) {
    const auto value = static_cast<uint16_t>(code);
    std::memcpy(stripe + kBytes * i, &value, kBytes);
  }
  static int exponent(uint32_t code) { return static_cast<int>((code & (kSign - 1)) >> kMantissaBits); }
  // Codes in the order of the values that they stand for.
  // Signs are random: a branch on them would be mispredicted.
  static uint32_t ordered(uint32_t code) { return code ^ (kSign | ((0 - (code >> (kBits - 1))) & kFull)); }
  static uint32_t code_of(uint32_t order) { return order ^ (kSign | (((order >> (kBits - 1)) - 1) & kFull)); }
  static int32_t step_between(uint32_t from, uint32_t to) {
    const uint32_t step = (ordered(to) - ordered(from)) & kFull;
    return static_cast<int32_t>(step ^ kSign) - static_cast<int32_t>(kSign);
  }
  static int gap_class(uint32_t code, int top) {
    return clamp_class(exponent(code) - top + kGapClasses - 1, kGapClasses);
  }
  static int step_class(uint32_t code, int top) {
    return clamp_class(exponent(code) - top + kStepClasses - 4, kStepClasses);
  }

  static int sampled_top(const uint8_t* base, size_t num_elements) {
    const size_t every = std::max<size_t>(num_elements / 256, 1);
    int top = 0;
    for (size_t i = 0; i < num_elements; i += every) top = std::max(top, exponent(load(base, i)));
    return std::max(top - kHeadroom, 0);
  }

  static constexpr size_t kBlockGroups = 32;
  struct Block {
    GroupMasks masks[kBlockGroups];
    uint32_t seen[kBlockGroups][kGapClasses];
    uint16_t places[kBlockGroups * 64 + 4];
  };

  // The elements of the block that differ, in `places`, and what their ranks need. Returns how many there are.
  static size_t find(const uint8_t* fresh, const uint8_t* base, size_t num_groups, int top, GapClass* classes,
                     Block* block) {
    size_t num_found = 0;
    uint32_t seen[kGapClasses];
    for (int c = 0; c < kGapClasses; ++c) seen[c] = static_cast<uint32_t>(classes[c].seen);
    for (size_t g = 0; g < num_groups; ++g) {
      GroupMasks& masks = block->masks[g];
      Simd::template masks<kBytes>(base + g * kGroupBytes, fresh + g * kGroupBytes, top, &masks);
      uint32_t counts[kGapClasses];
      Simd::count(masks, counts);
      for (int c = 0; c < kGapClasses; ++c) {
        block->seen[g][c] = seen[c];
        seen[c] += counts[c];
      }
      uint64_t left = masks.changed;
      const auto count = static_cast<size_t>(__builtin_popcountll(left));
      uint16_t* places = block->places + num_found;
      const size_t first = g * 64;
      for (int n = 0; n < 4; ++n, left &= left - 1) {  // four at least: what is too many is overwritten
        places[n] = static_cast<uint16_t>(first + static_cast<size_t>(__builtin_ctzll(left | uint64_t{1} << 63)));
      }
      for (size_t n = 4; n < count; ++n, left &= left - 1) {
        places[n] = static_cast<uint16_t>(first + static_cast<size_t>(__builtin_ctzll(left)));
      }
      num_found += count;
    }
    for (int c = 0; c < kGapClasses; ++c) classes[c].seen = seen[c];
    return num_found;
  }

 public:
  static size_t encode(const uint8_t* fresh, uint8_t* base, size_t span, uint8_t* out,
                       std::vector<DeltaChange>* changes, uint8_t* top_out, uint64_t* num_changed) {
    const size_t num_elements = span / kBytes, most = num_elements / 2;
    if (changes->size() < most + 1) changes->resize(most + 1);
    const int top = sampled_top(base, num_elements);
    *top_out = static_cast<uint8_t>(top);
    GapClass classes[kGapClasses];
    uint32_t first_gap[kGapClasses] = {};
    uint32_t* gap_of_next[kGapClasses];
    for (int c = 0; c < kGapClasses; ++c) gap_of_next[c] = &first_gap[c];
    // Sums, and from kCount on how many were added.
    uint64_t gaps[kGapClasses] = {}, steps[kStepClasses] = {};
    constexpr uint64_t kCount = uint64_t{1} << 40, kSum = kCount - 1;
    uint8_t class_of[256];  // by exponent: the gap class, and from bit 4 on the step class
    for (int e = 0; e < 256; ++e) {
      class_of[e] = static_cast<uint8_t>(clamp_class(e - top + kGapClasses - 1, kGapClasses) |
                                         clamp_class(e - top + kStepClasses - 4, kStepClasses) << 4);
    }
    DeltaChange* change = changes->data();
    DeltaChange* const end = change + most;
    *num_changed = 0;
    const auto close_gap = [&](int c, uint64_t gap) {
      *gap_of_next[c] = static_cast<uint32_t>(gap);
      gaps[c] += gap + kCount;
    };
    // Two loops over a block of groups: where changes are, then what they are. One loop over both would mispredict its
    // end in most groups.
    Block block;
    for (size_t at = 0; at < span; at += kBlockGroups * kGroupBytes) {
      const size_t num_groups = std::min<size_t>(kBlockGroups, (span - at) / kGroupBytes);
      const size_t found = find(fresh + at, base + at, num_groups, top, classes, &block);
      *num_changed += found;
      const size_t taken = std::min(found, static_cast<size_t>(end - change));
      for (size_t n = 0; n < taken; ++n) {
        const size_t i = block.places[n], g = i / 64;
        const uint32_t from = load(base + at, i), to = load(fresh + at, i);
        store(base + at, i, to);
        const int both = class_of[exponent(from)], c = both & 15, s = both >> 4;
        const uint64_t before = members(block.masks[g], c) & ((uint64_t{1} << (i % 64)) - 1);
        const uint64_t rank = block.seen[g][c] + static_cast<uint64_t>(__builtin_popcountll(before));
        close_gap(c, rank - classes[c].next);
        classes[c].next = rank + 1;
        const int32_t step = step_between(from, to);
        steps[s] += static_cast<uint64_t>(step < 0 ? -step : step) - 1 + kCount;
        *change = {0, step, static_cast<uint8_t>(c), static_cast<uint8_t>(s)};
        gap_of_next[c] = &change->next_gap;
        ++change;
      }
    }
    if (change == changes->data()) return 0;
    if (change == end) return span;
    for (int c = 0; c < kGapClasses; ++c) close_gap(c, classes[c].seen - classes[c].next);

    int gap_k[kGapClasses], step_k[kStepClasses];
    for (int c = 0; c < kGapClasses; ++c) {
      gap_k[c] = rice_param(gaps[c] & kSum, gaps[c] / kCount, kMaxGapParam);
      out[c] = static_cast<uint8_t>(gap_k[c]);
    }
    for (int s = 0; s < kStepClasses; ++s) {
      step_k[s] = (steps[s] & kSum) == 0 ? kAllOnes : rice_param(steps[s] & kSum, steps[s] / kCount, kAllOnes - 1);
    }
    for (int s = 0; s < kStepClasses; s += 2) {
      out[kGapClasses + s / 2] = static_cast<uint8_t>(step_k[s] | (step_k[s + 1] << 4));
    }
    BitWriter bits(out + kStripeParamBytes, span - kStripeParamBytes);
    for (int c = 0; c < kGapClasses; ++c) bits.put_rice(first_gap[c], gap_k[c]);
    for (const DeltaChange* each = changes->data(); each != change; ++each) {
      if (bits.is_full()) return span;
      bits.put(each->step < 0, 1);
      if (step_k[each->step_class] != kAllOnes) {
        bits.put_rice(static_cast<uint32_t>(each->step < 0 ? -each->step : each->step) - 1, step_k[each->step_class]);
      }
      bits.put_rice(each->next_gap, gap_k[each->gap_class]);
    }
    return std::min(kStripeParamBytes + bits.finish(), span);
  }

  static const char* apply(uint8_t* base, size_t span, const uint8_t* code, size_t size, uint8_t top) {
    if (size <= kStripeParamBytes) return "it is too short";
    int gap_k[kGapClasses], step_k[kStepClasses];
    for (int c = 0; c < kGapClasses; ++c) {
      gap_k[c] = code[c];
      if (gap_k[c] > kMaxGapParam) return "a gap parameter is too large";
    }
    for (int s = 0; s < kStepClasses; ++s) step_k[s] = (code[kGapClasses + s / 2] >> (s % 2 * 4)) & 15;
    BitReader bits(code + kStripeParamBytes, size - kStripeParamBytes);
    GapClass classes[kGapClasses];
    for (int c = 0; c < kGapClasses; ++c) classes[c].next = bits.take_rice(gap_k[c]);
    for (size_t at = 0; at < span; at += kGroupBytes) {
      GroupMasks masks;
      Simd::template masks<kBytes>(base + at, base + at, top, &masks);
      uint64_t ends[kGapClasses], pending = 0;
      uint32_t counts[kGapClasses];
      Simd::count(masks, counts);
      for (int c = 0; c < kGapClasses; ++c) {
        ends[c] = classes[c].seen + counts[c];
        if (classes[c].next < ends[c]) pending |= Simd::select(members(masks, c), classes[c].next - classes[c].seen);
      }
      while (pending != 0) {
        const auto i = static_cast<size_t>(__builtin_ctzll(pending));
        pending &= pending - 1;
        const uint32_t from = load(base + at, i);
        const int c = gap_class(from, top), k = step_k[step_class(from, top)];
        const bool is_down = bits.take(1) != 0;
        const uint32_t size_of_step = k == kAllOnes ? 1 : bits.take_rice(k) + 1;
        const uint32_t order = ordered(from) + (is_down ? 0 - size_of_step : size_of_step);
        store(base + at, i, code_of(order & kFull));
        classes[c].next += 1 + static_cast<uint64_t>(bits.take_rice(gap_k[c]));
        if (bits.is_over()) return "it ends too early";
        if (classes[c].next < ends[c]) pending |= Simd::select(members(masks, c), classes[c].next - classes[c].seen);
      }
      for (int c = 0; c < kGapClasses; ++c) classes[c].seen = ends[c];
    }
    for (const GapClass& each : classes) {
      if (each.next != each.seen) return "a gap leads beyond its class";
    }
    return bits.is_spent() ? nullptr : "it goes on beyond its last change";
  }
};

template <class Simd>
size_t encode_stripe(StripeKind kind, const uint8_t* fresh, uint8_t* base, size_t span, uint8_t* out,
                     std::vector<DeltaChange>* changes, uint8_t* top, uint64_t* num_changed) {
  return kind == kStripeWords ? StripeCodec<Simd, 2>::encode(fresh, base, span, out, changes, top, num_changed)
                              : StripeCodec<Simd, 1>::encode(fresh, base, span, out, changes, top, num_changed);
}

template <class Simd>
const char* apply_stripe(StripeKind kind, uint8_t* base, size_t span, const uint8_t* code, size_t size, uint8_t top) {
  return kind == kStripeWords ? StripeCodec<Simd, 2>::apply(base, span, code, size, top)
                              : StripeCodec<Simd, 1>::apply(base, span, code, size, top);
}

}  // namespace
}  // namespace wsync
