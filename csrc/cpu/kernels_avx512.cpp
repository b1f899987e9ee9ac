// AVX-512: the kernels of simd_*.h at its width.
#if defined(__x86_64__)

// The intrinsics of g++ 12 start from vectors that are undefined on purpose, and it warns of its own headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "core/descriptors.h"
#include "core/digest.h"
#include "core/dtype.h"
#include "cpu/kernels.h"

// Only the functions of this file may use AVX-512: a flag for the whole file would leak into inline functions that
// other files share.
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl")

#include "cpu/simd_avx512.h"
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

const Kernels& avx512_kernels() {
  static const Kernels table = vector_kernels();
  return table;
}

}  // namespace wsync

#pragma GCC pop_options
#endif
