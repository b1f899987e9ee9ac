// Programs of unpacking and of digests.
#include <algorithm>

#include "cuda/program_checks.h"
#include "cuda/program_moves.h"

namespace wsync {
namespace cuda {
namespace {

constexpr const char* kName = "UNPACK_DESC";
constexpr uint32_t kWordStep = 16 << 10;

// The word of 32 bits that a fill of 1, 2 or 4 bytes repeats.
uint32_t repeated(uint32_t fill, int32_t elem_bytes) {
  if (elem_bytes == 1) return (fill & 0xffu) * 0x01010101u;
  return elem_bytes == 2 ? (fill & 0xffffu) * 0x00010001u : fill;
}

void check_for_cuda(const UnpackDesc& d, size_t i, bool installed) {
  check_aligned(kName, i, "dst", d.dst, d.elem_bytes);
  if (!installed && d.op != kUnpackFill) {
    check_aligned(kName, i, "src_offset", d.src_offset, d.op == kUnpackExponent ? 4 : d.elem_bytes);
  }
  check_index(kName, i, num_elements(d.extent), "elements");
}

// The record of a box that moves in vectors, and how many; 0 where it does not.
uint64_t plan_vectors(const UnpackDesc& d, bool installed, MoveRecord* m) {
  if (d.op == kUnpackExponent && !installed) return 0;
  const bool reads_bucket = !installed && d.op == kUnpackCopy;
  MoveBox box{};
  box.dst = d.dst;
  box.dst_stride = d.dst_stride;
  box.src = reads_bucket ? d.src_offset : d.dst;
  box.src_stride = reads_bucket ? d.src_stride : d.dst_stride;
  box.extent = d.extent;
  box.src_bytes = box.dst_bytes = d.elem_bytes;
  m->src_based = reads_bucket ? 1 : 0;
  m->wire_word = d.wire_word;
  m->counted = d.wire_word != kUncountedWord ? 1 : 0;
  m->elem_bytes = d.elem_bytes;
  m->fill = repeated(d.fill, d.elem_bytes);
  return plan_move(box, 16, m);
}

void add(const UnpackDesc& d, size_t i, bool installed, Builder* builder) {
  const uint64_t numel = num_elements(d.extent);
  if (numel == 0 || (installed && d.wire_word == kUncountedWord)) return;
  check_for_cuda(d, i, installed);
  MoveRecord m{};
  m.desc_idx = static_cast<uint32_t>(i);
  if (const uint64_t vectors = plan_vectors(d, installed, &m)) {
    const Kernel kernel = installed ? kMoveDigest : (d.op == kUnpackFill ? kMoveFill : kMoveCopy);
    return builder->add_range(kernel, builder->add_record(kernel, m), vectors, kMoveStep);
  }
  const UnpackRecord record = {d, static_cast<uint32_t>(i), installed ? 1 : 0};
  const uint64_t words = (numel * static_cast<uint64_t>(d.elem_bytes) + 7) / 8;
  builder->add_range(kUnpackWords, builder->add_record(kUnpackWords, record), words, kWordStep);
}

Program program_of(const UnpackDesc* descs, size_t num_descs, bool installed) {
  check_count(kName, num_descs);
  Builder builder;
  for (size_t i = 0; i < num_descs; ++i) add(descs[i], i, installed, &builder);
  return builder.build();
}

// Contiguous bytes as a box of whole elements.
UnpackDesc bytes_desc(uint64_t address, uint64_t num_bytes, uint64_t first_word) {
  UnpackDesc d{};
  d.dst = address;
  std::fill(d.extent, d.extent + kNumDims, 1);
  d.extent[kNumDims - 1] = static_cast<int64_t>(num_bytes);
  d.dst_stride[kNumDims - 1] = 1;
  d.elem_bytes = 1;
  d.wire_word = first_word;
  return d;
}

}  // namespace

Program unpack_program(const UnpackDesc* descs, size_t num_descs) {
  Program program = program_of(descs, num_descs, false);
  program.needs_base = std::any_of(
      descs, descs + num_descs, [](const UnpackDesc& d) { return d.op != kUnpackFill && num_elements(d.extent) != 0; });
  return program;
}

Program installed_program(const UnpackDesc* descs, size_t num_descs) { return program_of(descs, num_descs, true); }

Program digest_program(uint64_t address, uint64_t num_bytes, uint64_t first_word) {
  constexpr uint64_t kPart = uint64_t{1} << 30;
  std::vector<UnpackDesc> parts;
  for (uint64_t at = 0; at < num_bytes; at += kPart) {
    // The last bytes that fill no vector are a part of their own, so that the rest keeps its vectors.
    const uint64_t n = std::min(kPart, num_bytes - at);
    const uint64_t whole = n / 16 * 16;
    if (whole != 0) parts.push_back(bytes_desc(address + at, whole, first_word + at / 8));
    if (n != whole) parts.push_back(bytes_desc(address + at + whole, n - whole, first_word + (at + whole) / 8));
  }
  return program_of(parts.data(), parts.size(), true);
}

}  // namespace cuda
}  // namespace wsync
