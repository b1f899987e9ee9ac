// Bytes from box to box: copies with and without broadcast, fills, roundings to bf16, and digests of what lies there.
#pragma once

#include "cuda/source.cuh"

namespace wsync {
namespace cuda {

enum class Move { kCopy, kFill, kDigest };

constexpr int kMoveUnroll = 4;

// Byte offsets of a box's vector `idx` at both sides.
struct Place {
  int64_t src;
  int64_t dst;
};

__device__ __forceinline__ Place place_of(const MoveRecord& m, uint32_t idx, int64_t src_bytes, int64_t dst_bytes) {
  const uint32_t row = divide(idx, m.run);
  const auto col = static_cast<int64_t>(idx - row * m.run.divisor);
  const uint32_t plane = divide(row, m.extent[1]);
  const auto i2 = static_cast<int64_t>(row - plane * m.extent[1].divisor);
  const uint32_t outer = divide(plane, m.extent[0]);
  const auto i1 = static_cast<int64_t>(plane - outer * m.extent[0].divisor);
  const auto i0 = static_cast<int64_t>(outer);
  return {i0 * m.src_stride[0] + i1 * m.src_stride[1] + i2 * m.src_stride[2] + col * src_bytes,
          i0 * m.dst_stride[0] + i1 * m.dst_stride[1] + i2 * m.dst_stride[2] + col * dst_bytes};
}

// Bits of `test` are set where the words hold a value that is not finite.
__device__ __forceinline__ uint32_t suspicious_bits(const MoveRecord& m, const uint32_t (&w)[4]) {
  const uint32_t even = ((w[0] & m.mask[0]) + m.bias[0]) | ((w[2] & m.mask[0]) + m.bias[0]);
  const uint32_t odd = ((w[1] & m.mask[1]) + m.bias[1]) | ((w[3] & m.mask[1]) + m.bias[1]);
  return (even | odd) & m.test;
}

__device__ __forceinline__ bool moved_nonfinite(const uint8_t* at, int32_t src_dtype) {
  if (src_dtype == kSrcBytes) return false;
  if (src_dtype == kSrcF64) return (load_global<uint32_t>(at + 4) & 0x7fffffffu) >= kF64InfinityHigh;
  return element_nonfinite(at, src_dtype);
}

// Reports the first non-finite of `n` contiguous elements, the first of which has the packed index `element`.
__device__ __forceinline__ void report_run(const MoveRecord& m, const uint8_t* src, int64_t elem_bytes,
                                           uint64_t element, int n, Result* result) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    if (!moved_nonfinite(src + i * elem_bytes, m.src_dtype)) continue;
    atomicMin(&result->bad, bad_key(m.desc_idx, element + static_cast<uint64_t>(i)));
    return;
  }
}

__device__ __forceinline__ const uint8_t* move_src(const MoveRecord& m, const uint8_t* base) {
  return m.src_based ? base + m.src : reinterpret_cast<const uint8_t*>(m.src);
}

__device__ __forceinline__ uint8_t* move_dst(const MoveRecord& m, uint8_t* base) {
  return m.dst_based ? base + m.dst : reinterpret_cast<uint8_t*>(m.dst);
}

// A unit: vectors [x, x + n) of the record's box. kDigest reads the source and writes nothing.
template <Move kMove>
__global__ void __launch_bounds__(kThreads, 3)
    move_kernel(const MoveRecord* records, const Unit* units, uint32_t num_units, uint8_t* base, Result* result) {
  uint64_t sum = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const MoveRecord& m = records[unit.record];
    const uint8_t* src = move_src(m, base);
    uint8_t* dst = move_dst(m, base);
    const uint32_t end = unit.x + unit.n;
    for (uint32_t first = unit.x + threadIdx.x; first < end; first += kThreads * kMoveUnroll) {
      Words4 words[kMoveUnroll];
      Place places[kMoveUnroll];
#pragma unroll
      for (int k = 0; k < kMoveUnroll; ++k) {
        const uint32_t idx = first + static_cast<uint32_t>(k) * kThreads;
        if (idx >= end) break;
        places[k] = place_of(m, idx, 16, 16);
        if (kMove == Move::kFill) {
          words[k] = {{m.fill, m.fill, m.fill, m.fill}};
        } else {
          words[k] = load_global_16(src + places[k].src);
        }
      }
#pragma unroll
      for (int k = 0; k < kMoveUnroll; ++k) {
        const uint32_t idx = first + static_cast<uint32_t>(k) * kThreads;
        if (idx >= end) break;
        if (kMove != Move::kDigest) store_global_16(dst + places[k].dst, words[k]);
        if (m.counted) sum += digest_vector(words[k].w, m.wire_word + 2 * static_cast<uint64_t>(idx));
        if (kMove == Move::kCopy && suspicious_bits(m, words[k].w) != 0) {
          const int n = 16 / m.elem_bytes;
          report_run(m, src + places[k].src, m.elem_bytes, static_cast<uint64_t>(idx) * n, n, result);
        }
      }
    }
  }
  add_digest(sum, result);
}

}  // namespace cuda
}  // namespace wsync
