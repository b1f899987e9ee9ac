// The parts of pack(): how the boxes of an operation are cut into units of work, and what a unit does. A unit returns
// the digest of the words that it wrote, and reports the first value that is not finite.
#pragma once

#include <vector>

#include "core/descriptors.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/tile.h"

namespace wsync {

// Copies and bf16: a range of packed elements that begins on a digest word.
struct ElementUnit {
  size_t desc;
  int64_t begin;
  int64_t end;
};

void append_elements(const PackDesc& d, size_t desc, std::vector<ElementUnit>* units);
uint64_t pack_elements(const PackDesc& d, const ElementUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad);

// Recipes with 128 x 128 blocks. Only matrices whose rows and blocks begin on digest words are counted meanwhile.
bool counted_in_tiles(const PackDesc& d);
uint64_t pack_tiles(const PackDesc& d, const TileUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad);

// Recipes whose blocks lie in a row: whole rows of the matrix.
struct RowUnit {
  size_t desc;
  int64_t begin;
  int64_t end;
};

void append_rows(const Matrix& matrix, size_t desc, std::vector<RowUnit>* units);
bool counted_in_rows(const PackDesc& d);
uint64_t pack_rows(const PackDesc& d, const RowUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad);

}  // namespace wsync
