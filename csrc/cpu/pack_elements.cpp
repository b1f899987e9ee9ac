#include <algorithm>
#include <cstring>

#include "core/dtype.h"
#include "cpu/box.h"
#include "cpu/pack_parts.h"

namespace wsync {
namespace {

constexpr int64_t kUnitElems = 64 << 10;
constexpr int64_t kScratchElems = 2 << 10;
// Shorter runs are gathered first: a kernel's call costs more than a copy of them.
constexpr int64_t kDirectRunBytes = 128;

Box box_of(const PackDesc& d) { return Box(d.src, d.src_stride, d.extent, kNumDims, d.elem_bytes); }

int64_t wire_bytes(const PackDesc& d) { return d.op == kOpCopy ? d.elem_bytes : 2; }

// The dtype whose rules the values follow: every f32 that is not copied is rounded here, so one that rounds to infinity
// is bad however it was declared.
int32_t checked_dtype(const PackDesc& d) {
  return d.op == kOpBf16 && d.src_dtype == kSrcF32Exact ? static_cast<int32_t>(kSrcF32) : d.src_dtype;
}

// From here on what the kernels of put() report as the maximum is not finite.
uint32_t nonfinite_bits(const PackDesc& d) {
  if (d.src_dtype == kSrcBf16) return kF32Infinity;
  if (d.op == kOpBf16) return kF32Bf16Overflow;
  switch (d.src_dtype) {
    case kSrcF16:
      return static_cast<uint32_t>(kF16Infinity) << 16;
    case kSrcF32Exact:
      return kF32Infinity;
    case kSrcF64:
      return kF64InfinityHigh;
    default:
      return ~0u;  // bytes are not looked at
  }
}

// n contiguous source elements to the wire.
uint64_t put(const PackDesc& d, uint8_t* dst, const void* src, int64_t n, uint64_t word, uint32_t* max_bits,
             const Kernels& k) {
  const auto count = static_cast<size_t>(n);
  if (d.src_dtype == kSrcBf16) return k.copy_float16(dst, src, count, word, max_bits);
  if (d.op == kOpBf16) return k.round_bf16(dst, src, count, word, max_bits);
  switch (d.src_dtype) {
    case kSrcF16:
      return k.copy_float16(dst, src, count, word, max_bits);
    case kSrcF32Exact:
      return k.copy_float32(dst, src, count, word, max_bits);
    case kSrcF64:
      return k.copy_float64(dst, src, count, word, max_bits);
    default:
      return k.copy(dst, src, count * static_cast<size_t>(d.elem_bytes), word);
  }
}

uint64_t put_f16(uint8_t* dst, const uint8_t* src, int64_t n, uint64_t word, uint32_t* max_bits, const Kernels& k) {
  float values[kScratchElems];
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, src + 2 * i, 2);
    values[i] = f32_of_f16(half);
  }
  return k.round_bf16(dst, values, static_cast<size_t>(n), word, max_bits);
}

uint64_t put_unit(const PackDesc& d, const ElementUnit& unit, uint8_t* dst_base, const Kernels& k, uint32_t* max_bits) {
  const Box box = box_of(d);
  const int64_t wire = wire_bytes(d);
  uint8_t* dst = dst_base + d.dst_offset + unit.begin * wire;
  uint64_t word = d.wire_word + static_cast<uint64_t>(unit.begin * wire) / 8;
  uint64_t sum = 0;
  const int64_t run_bytes = box.run() * wire;
  const bool converted = d.op == kOpBf16 && d.src_dtype == kSrcF16;
  const bool direct = box.contiguous_runs() && !converted &&
                      (box.run() == box.numel() || (run_bytes % 8 == 0 && run_bytes >= kDirectRunBytes));
  if (direct) {
    box.for_read_runs(unit.begin, unit.end, [&](uint64_t src, int64_t n) {
      sum += put(d, dst, reinterpret_cast<const void*>(src), n, word, max_bits, k);
      dst += n * wire;
      word += static_cast<uint64_t>(n * wire) / 8;
    });
    return sum;
  }
  alignas(64) uint8_t scratch[kScratchElems * 8];
  for (int64_t at = unit.begin; at < unit.end; at += kScratchElems) {
    const int64_t end = std::min(unit.end, at + kScratchElems);
    box.gather(scratch, at, end);
    sum += converted ? put_f16(dst, scratch, end - at, word, max_bits, k)
                     : put(d, dst, scratch, end - at, word, max_bits, k);
    dst += (end - at) * wire;
    word += static_cast<uint64_t>((end - at) * wire) / 8;
  }
  return sum;
}

void report(const PackDesc& d, const ElementUnit& unit, FirstBad* bad) {
  const Box box = box_of(d);
  const int32_t src_dtype = checked_dtype(d);
  int64_t element = unit.begin;
  int64_t first = -1;
  box.for_runs(unit.begin, unit.end, [&](uint64_t src, int64_t n) {
    for (int64_t i = 0; i < n && first < 0; ++i) {
      if (is_nonfinite(src + static_cast<uint64_t>(i * box.run_stride()), src_dtype)) first = element + i;
    }
    element += n;
  });
  bad->report(unit.desc, first);
}

}  // namespace

void append_elements(const PackDesc& d, size_t desc, std::vector<ElementUnit>* units) {
  const int64_t numel = box_of(d).numel();
  for (int64_t at = 0; at < numel; at += kUnitElems) units->push_back({desc, at, std::min(numel, at + kUnitElems)});
}

uint64_t pack_elements(const PackDesc& d, const ElementUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad) {
  uint32_t max_bits = 0;
  const uint64_t sum = put_unit(d, unit, dst_base, k, &max_bits);
  if (max_bits >= nonfinite_bits(d)) report(d, unit, bad);
  return sum;
}

}  // namespace wsync
