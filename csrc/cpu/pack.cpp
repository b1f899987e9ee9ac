#include <atomic>
#include <vector>

#include "cpu/pack_parts.h"
#include "cpu/thread_pool.h"

namespace wsync {
namespace {

enum class Kind { kElements, kTiles, kRows };

Kind kind_of(const PackDesc& d) {
  if (d.op == kOpCopy || d.op == kOpBf16) return Kind::kElements;
  return d.op <= kOpFp8Scaled ? Kind::kTiles : Kind::kRows;
}

bool counted_in_pass(const PackDesc& d) {
  switch (kind_of(d)) {
    case Kind::kElements:
      return true;
    case Kind::kTiles:
      return counted_in_tiles(d);
    default:
      return counted_in_rows(d);
  }
}

// Matrices whose words straddle rows or blocks are digested from the bucket, after all of it is written. All of them
// have a byte for each value.
uint64_t digest_uncounted(const PackDesc* descs, size_t num_descs, const uint8_t* dst_base, int num_threads, Isa isa) {
  uint64_t sum = 0;
  for (size_t i = 0; i < num_descs; ++i) {
    const PackDesc& d = descs[i];
    if (counted_in_pass(d)) continue;
    const auto nbytes = static_cast<size_t>(d.extent[2] * d.extent[3]);
    sum += digest(dst_base + d.dst_offset, nbytes, d.wire_word, num_threads, isa);
  }
  return sum;
}

}  // namespace

uint64_t pack(const PackDesc* descs, size_t num_descs, uint8_t* dst_base, int num_threads, Isa isa, FirstBad* bad) {
  const Kernels& k = kernels_for(isa);
  std::vector<TileUnit> tiles;
  std::vector<RowUnit> rows;
  std::vector<ElementUnit> elements;
  for (size_t i = 0; i < num_descs; ++i) {
    const PackDesc& d = descs[i];
    switch (kind_of(d)) {
      case Kind::kElements:
        append_elements(d, i, &elements);
        break;
      case Kind::kTiles:
        append_units(matrix_of(d), i, &tiles);
        break;
      case Kind::kRows:
        append_rows(matrix_of(d), i, &rows);
        break;
    }
  }
  std::atomic<uint64_t> sum{0};
  parallel_for(tiles.size() + rows.size() + elements.size(), num_threads, [&](size_t i) {
    uint64_t part = 0;
    if (i < tiles.size()) {
      part = pack_tiles(descs[tiles[i].desc], tiles[i], dst_base, k, bad);
    } else if (size_t at = i - tiles.size(); at < rows.size()) {
      part = pack_rows(descs[rows[at].desc], rows[at], dst_base, k, bad);
    } else {
      at -= rows.size();
      part = pack_elements(descs[elements[at].desc], elements[at], dst_base, k, bad);
    }
    k.fence();
    sum.fetch_add(part, std::memory_order_relaxed);
  });
  return sum.load() + digest_uncounted(descs, num_descs, dst_base, num_threads, isa);
}

}  // namespace wsync
