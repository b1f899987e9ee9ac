#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/box.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace wsync {
namespace {

// A unit is a range of packed elements; its begin is a multiple of 8, so that it begins on a digest word.
struct Unit {
  size_t desc;
  int64_t begin;
  int64_t end;
};

constexpr int64_t kUnitBytes = 256 << 10;
constexpr int64_t kScratchBytes = 16 << 10;
// Shorter runs are gathered first: a kernel's call costs more than a copy of them.
constexpr int64_t kDirectRunBytes = 128;

Box box_of(const UnpackDesc& d) { return Box(d.dst, d.dst_stride, d.extent, kNumDims, d.elem_bytes); }

// What an unpack operation reads, in packed order of the extent.
class Source {
 public:
  Source(const UnpackDesc& d, const uint8_t* src_base)
      : d_(d),
        box_(reinterpret_cast<uint64_t>(src_base + d.src_offset), d.src_stride, d.extent, kNumDims,
             d.op == kUnpackExponent ? 4 : d.elem_bytes) {}

  // The bytes are where they are needed already.
  bool packed() const {
    return d_.op == kUnpackCopy && (box_.numel() <= 1 || (box_.contiguous_runs() && box_.run() == box_.numel()));
  }

  // What goes to the destination's elements [begin, end), at most kScratchBytes of it.
  void read(uint8_t* out, int64_t begin, int64_t end) const {
    if (d_.op == kUnpackFill) return fill(out, end - begin);
    if (d_.op == kUnpackCopy) return box_.gather(out, begin, end);
    uint32_t bits[kExponents];
    for (int64_t at = begin; at < end; at += kExponents) {
      const int64_t n = std::min(kExponents, end - at);
      box_.gather(reinterpret_cast<uint8_t*>(bits), at, at + n);
      for (int64_t i = 0; i < n; ++i) *out++ = static_cast<uint8_t>(bits[i] >> 23);
    }
  }

 private:
  static constexpr int64_t kExponents = 1024;

  void fill(uint8_t* out, int64_t n) const {
    for (int64_t i = 0; i < n; ++i, out += d_.elem_bytes) {
      std::memcpy(out, &d_.fill, static_cast<size_t>(d_.elem_bytes));
    }
  }

  const UnpackDesc& d_;
  Box box_;
};

std::vector<Unit> units_of(const UnpackDesc* descs, size_t num_descs) {
  std::vector<Unit> units;
  for (size_t i = 0; i < num_descs; ++i) {
    const int64_t numel = box_of(descs[i]).numel();
    const int64_t step = kUnitBytes / descs[i].elem_bytes;
    for (int64_t at = 0; at < numel; at += step) units.push_back({i, at, std::min(numel, at + step)});
  }
  return units;
}

bool direct(const Box& box) {
  const int64_t run_bytes = box.run() * box.elem_bytes();
  return box.contiguous_runs() &&
         (run_bytes == box.numel() * box.elem_bytes() || (run_bytes % 8 == 0 && run_bytes >= kDirectRunBytes));
}

// Sources that are not packed: through a buffer.
uint64_t unpack_through_scratch(const UnpackDesc& d, const Unit& unit, const Source& source, const Kernels& k) {
  const Box box = box_of(d);
  uint64_t word = d.wire_word + static_cast<uint64_t>(unit.begin * d.elem_bytes) / 8;
  uint64_t sum = 0;
  alignas(64) uint8_t scratch[kScratchBytes];
  const int64_t step = kScratchBytes / d.elem_bytes;
  for (int64_t at = unit.begin; at < unit.end; at += step) {
    const int64_t end = std::min(unit.end, at + step);
    source.read(scratch, at, end);
    const auto nbytes = static_cast<size_t>((end - at) * d.elem_bytes);
    sum += k.digest(scratch, nbytes, word);
    box.scatter(scratch, at, end);
    word += nbytes / 8;
  }
  return d.wire_word == kUncountedWord ? 0 : sum;
}

uint64_t unpack_unit(const UnpackDesc& d, const Unit& unit, const uint8_t* src_base, const Kernels& k) {
  if (const Source source(d, src_base); !source.packed()) return unpack_through_scratch(d, unit, source, k);
  const Box box = box_of(d);
  const uint8_t* src = src_base + d.src_offset + unit.begin * d.elem_bytes;
  uint64_t word = d.wire_word + static_cast<uint64_t>(unit.begin * d.elem_bytes) / 8;
  const bool counted = d.wire_word != kUncountedWord;
  uint64_t sum = 0;
  if (!direct(box)) {
    if (counted) sum = k.digest(src, static_cast<size_t>((unit.end - unit.begin) * d.elem_bytes), word);
    box.scatter(src, unit.begin, unit.end);
    return sum;
  }
  box.for_runs(unit.begin, unit.end, [&](uint64_t dst, int64_t n) {
    const auto nbytes = static_cast<size_t>(n * d.elem_bytes);
    sum += k.copy(reinterpret_cast<void*>(dst), src, nbytes, word);
    src += nbytes;
    word += nbytes / 8;
  });
  return counted ? sum : 0;
}

uint64_t digest_unit(const UnpackDesc& d, const Unit& unit, const Kernels& k) {
  const Box box = box_of(d);
  uint64_t word = d.wire_word + static_cast<uint64_t>(unit.begin * d.elem_bytes) / 8;
  uint64_t sum = 0;
  if (direct(box)) {
    box.for_read_runs(unit.begin, unit.end, [&](uint64_t src, int64_t n) {
      const auto nbytes = static_cast<size_t>(n * d.elem_bytes);
      sum += k.digest(reinterpret_cast<const void*>(src), nbytes, word);
      word += nbytes / 8;
    });
    return sum;
  }
  alignas(64) uint8_t scratch[kScratchBytes];
  const int64_t step = kScratchBytes / d.elem_bytes;
  for (int64_t at = unit.begin; at < unit.end; at += step) {
    const int64_t end = std::min(unit.end, at + step);
    box.gather(scratch, at, end);
    const auto nbytes = static_cast<size_t>((end - at) * d.elem_bytes);
    sum += k.digest(scratch, nbytes, word);
    word += nbytes / 8;
  }
  return sum;
}

}  // namespace

uint64_t unpack(const UnpackDesc* descs, size_t num_descs, const uint8_t* src_base, int num_threads, Isa isa) {
  const Kernels& k = kernels_for(isa);
  const std::vector<Unit> units = units_of(descs, num_descs);
  std::atomic<uint64_t> sum{0};
  parallel_for(units.size(), num_threads, [&](size_t i) {
    sum.fetch_add(unpack_unit(descs[units[i].desc], units[i], src_base, k), std::memory_order_relaxed);
    k.fence();
  });
  return sum.load();
}

uint64_t installed_digest(const UnpackDesc* descs, size_t num_descs, int num_threads, Isa isa) {
  const Kernels& k = kernels_for(isa);
  const std::vector<Unit> units = units_of(descs, num_descs);
  std::atomic<uint64_t> sum{0};
  parallel_for(units.size(), num_threads, [&](size_t i) {
    const UnpackDesc& d = descs[units[i].desc];
    if (d.wire_word != kUncountedWord) sum.fetch_add(digest_unit(d, units[i], k), std::memory_order_relaxed);
  });
  return sum.load();
}

}  // namespace wsync
