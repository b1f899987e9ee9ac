#include "cpu/box.h"

namespace wsync {
namespace {

template <typename Elem>
void gather_run(uint8_t* out, uint64_t src, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i, src += static_cast<uint64_t>(stride), out += sizeof(Elem)) {
    std::memcpy(out, reinterpret_cast<const void*>(src), sizeof(Elem));
  }
}

template <typename Elem>
void scatter_run(const uint8_t* in, uint64_t dst, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i, dst += static_cast<uint64_t>(stride), in += sizeof(Elem)) {
    std::memcpy(reinterpret_cast<void*>(dst), in, sizeof(Elem));
  }
}

}  // namespace

Box::Box(uint64_t address, const int64_t* stride, const int64_t* extent, int num_dims, int64_t elem_bytes)
    : address_(address), elem_bytes_(elem_bytes), numel_(1) {
  std::fill(stride_, stride_ + kNumDims, 0);
  std::fill(extent_, extent_ + kNumDims, 1);
  stride_[kNumDims - 1] = elem_bytes;
  int at = kNumDims;  // first merged dimension so far
  for (int d = num_dims - 1; d >= 0; --d) {
    numel_ *= extent[d];
    if (extent[d] == 1) continue;
    const int64_t bytes = stride[d] * elem_bytes;
    if (at < kNumDims && bytes == stride_[at] * extent_[at]) {
      extent_[at] *= extent[d];
    } else {
      --at;
      extent_[at] = extent[d];
      stride_[at] = bytes;
    }
  }
}

void Box::gather(uint8_t* out, int64_t begin, int64_t end) const {
  for_runs(begin, end, [&](uint64_t src, int64_t n) {
    const int64_t nbytes = n * elem_bytes_;
    if (contiguous_runs()) {
      std::memcpy(out, reinterpret_cast<const void*>(src), static_cast<size_t>(nbytes));
    } else if (elem_bytes_ == 1) {
      gather_run<uint8_t>(out, src, run_stride(), n);
    } else if (elem_bytes_ == 2) {
      gather_run<uint16_t>(out, src, run_stride(), n);
    } else if (elem_bytes_ == 4) {
      gather_run<uint32_t>(out, src, run_stride(), n);
    } else {
      gather_run<uint64_t>(out, src, run_stride(), n);
    }
    out += nbytes;
  });
}

void Box::scatter(const uint8_t* in, int64_t begin, int64_t end) const {
  for_runs(begin, end, [&](uint64_t dst, int64_t n) {
    const int64_t nbytes = n * elem_bytes_;
    if (contiguous_runs()) {
      std::memcpy(reinterpret_cast<void*>(dst), in, static_cast<size_t>(nbytes));
    } else if (elem_bytes_ == 1) {
      scatter_run<uint8_t>(in, dst, run_stride(), n);
    } else if (elem_bytes_ == 2) {
      scatter_run<uint16_t>(in, dst, run_stride(), n);
    } else if (elem_bytes_ == 4) {
      scatter_run<uint32_t>(in, dst, run_stride(), n);
    } else {
      scatter_run<uint64_t>(in, dst, run_stride(), n);
    }
    in += nbytes;
  });
}

}  // namespace wsync
