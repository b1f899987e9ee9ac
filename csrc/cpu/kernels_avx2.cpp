// AVX2: the kernels of simd_*.h at its width.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "core/descriptors.h"
#include "core/digest.h"
#include "core/dtype.h"
#include "cpu/kernels.h"

// Only the functions of this file may use AVX2: a flag for the whole file would leak into inline functions that other
// files share.
#pragma GCC push_options
#pragma GCC target("avx2")

#include "cpu/simd_avx2.h"
// What follows needs the vectors.
#include "cpu/simd_codes.h"
#include "cpu/simd_stream.h"
// What follows needs those.
#include "cpu/simd_decode.h"
#include "cpu/simd_rows.h"
#include "cpu/simd_tiles.h"
// What follows needs all.
#include "cpu/simd_table.h"

namespace wsync {

const Kernels& avx2_kernels() {
  static const Kernels table = vector_kernels();
  return table;
}

}  // namespace wsync

#pragma GCC pop_options
#endif
