// Walking a strided box in packed (row-major) order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/descriptors.h"

namespace wsync {

// A box in memory. Adjacent dimensions that lie contiguously are merged, so that runs are as long as they can be.
class Box {
 public:
  Box(uint64_t address, const int64_t* stride, const int64_t* extent, int num_dims, int64_t elem_bytes);

  int64_t numel() const { return numel_; }
  int64_t elem_bytes() const { return elem_bytes_; }
  // Elements of the innermost merged dimension, and the bytes from one of them to the next.
  int64_t run() const { return extent_[kNumDims - 1]; }
  int64_t run_stride() const { return stride_[kNumDims - 1]; }
  bool contiguous_runs() const { return run_stride() == elem_bytes_ || run() == 1; }

  // Calls fn(address, n) for the parts of runs that make up the packed elements [begin, end), in order.
  template <typename Fn>
  void for_runs(int64_t begin, int64_t end, Fn fn) const {
    int64_t col = begin % run();
    int64_t row = begin / run();
    for (int64_t at = begin; at < end; ++row, col = 0) {
      const int64_t n = std::min(run() - col, end - at);
      fn(address(row) + static_cast<uint64_t>(col * run_stride()), n);
      at += n;
    }
  }

  // The same for runs that are read: fetches some of what comes next, which the hardware does not guess over gaps.
  template <typename Fn>
  void for_read_runs(int64_t begin, int64_t end, Fn fn) const {
    const int64_t run_bytes = run() * elem_bytes_;
    const int64_t last_row = (end - 1) / run();
    if (!contiguous_runs() || run_bytes > kFetchBytes) return for_runs(begin, end, fn);
    const int64_t distance = kFetchBytes / run_bytes;
    int64_t row = begin / run();
    for_runs(begin, end, [&](uint64_t src, int64_t n) {
      const uint64_t ahead = address(std::min(last_row, row++ + distance));
      for (int64_t i = 0; i < run_bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + i), 0, 2);
      fn(src, n);
    });
  }

  // Packs elements [begin, end) into `out`, and back. Elements keep their bytes.
  void gather(uint8_t* out, int64_t begin, int64_t end) const;
  void scatter(const uint8_t* in, int64_t begin, int64_t end) const;

 private:
  static constexpr int64_t kFetchBytes = 8192;

  uint64_t address(int64_t row) const {
    uint64_t at = address_;
    for (int d = kNumDims - 2; d >= 0 && row != 0; --d) {
      at += static_cast<uint64_t>((row % extent_[d]) * stride_[d]);
      row /= extent_[d];
    }
    return at;
  }

  uint64_t address_;
  int64_t stride_[kNumDims];  // bytes
  int64_t extent_[kNumDims];
  int64_t elem_bytes_;
  int64_t numel_;
};

}  // namespace wsync
