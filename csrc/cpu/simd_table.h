// The table of kernels of one instruction set. Include after the other simd_*.h headers.
#pragma once

#include "cpu/kernels.h"

namespace wsync {
namespace {

inline void fence() { _mm_sfence(); }

inline Kernels vector_kernels() {
  return {digest,
          copy,
          checked<CheckFloat16Stage, 2>,
          checked<CheckFloat32Stage, 4>,
          checked<CheckFloat64Stage, 8>,
          checked<RoundBf16Stage, 2>,
          load<Bf16Loader>,
          load<F32RoundLoader>,
          load<F32Loader>,
          quantise_tile<Pow2Quantiser>,
          quantise_tile<Bf16Quantiser>,
          quantise_tile<F32Quantiser>,
          {row_kernels<Bf16Values>(), row_kernels<F32Values>()},
          decode<E4m3Codes>,
          decode<E2m1Codes>,
          fence};
}

}  // namespace
}  // namespace wsync
