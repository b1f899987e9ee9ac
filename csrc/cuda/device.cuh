// The only door between the kernels and the machine. Kernels use what is here, blockIdx, gridDim and threadIdx (x
// only),
// __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync and __shfl_down_sync of uint32_t and unsigned long long,
// __ballot_sync, __any_sync, atomicAdd and atomicMin of unsigned long long, and atomicMax of unsigned int.
//
// With WSYNC_EMULATE a C++ compiler builds the same kernels for the CPU, and emulator/cuda_emulator.h stands for CUDA's
// headers. It defines the names above, __global__, __device__, __forceinline__, __launch_bounds__, WSYNC_SHARED,
// WSYNC_LAUNCH and WSYNC_CHECK_ALIGNED(pointer, bytes). Inline PTX and __CUDA_ARCH__ occur in this file alone, each
// beside a portable twin of the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(WSYNC_EMULATE)
#include <cmath>

#include "emulator/cuda_emulator.h"
#else
#include <cuda_runtime.h>

// A static array in shared memory.
#define WSYNC_SHARED(type, name, count) __shared__ type name[count]
// Parentheses around a kernel with several template arguments.
#define WSYNC_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define WSYNC_CHECK_ALIGNED(pointer, bytes) ((void)0)
#endif

#include "core/dtype.h"

namespace wsync {
namespace cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct alignas(8) Words2 {
  uint32_t w[2];
};

// Payload. Addresses come out of tables, so the compiler would not know that they are global memory.

#if defined(WSYNC_EMULATE)

inline Words4 load_global_16(const void* p) {
  WSYNC_CHECK_ALIGNED(p, 16);
  Words4 v;
  std::memcpy(&v, p, 16);
  return v;
}

inline Words4 load_global_16_written(const void* p) { return load_global_16(p); }

inline void store_global_16(void* p, const Words4& v) {
  WSYNC_CHECK_ALIGNED(p, 16);
  std::memcpy(p, &v, 16);
}

template <typename T>
inline T load_global(const void* p) {
  WSYNC_CHECK_ALIGNED(p, sizeof(T));
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

template <typename T>
inline void store_global(void* p, T v) {
  WSYNC_CHECK_ALIGNED(p, sizeof(T));
  std::memcpy(p, &v, sizeof(T));
}

#else

// Read once: past the first-level cache's allocation.
__device__ __forceinline__ Words4 load_global_16(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(__cvta_generic_to_global(p)));
  return v;
}

__device__ __forceinline__ void store_global_16(void* p, const Words4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// The same for memory that the kernel writes as well.
__device__ __forceinline__ Words4 load_global_16_written(const void* p) {
  Words4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}

// Single elements of 1, 2, 4 or 8 bytes, aligned to their size. Ordered with stores of the same kernel, unlike the
// vector load.
template <typename T>
__device__ __forceinline__ T load_global(const void* p) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "elements of 1, 2, 4 or 8 bytes");
  const auto at = __cvta_generic_to_global(p);
  T value;
  if (sizeof(T) == 8) {
    uint64_t v;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    std::memcpy(&value, &v, sizeof(T));
  } else {
    uint32_t v;
    if (sizeof(T) == 4) asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    if (sizeof(T) == 2) asm volatile("ld.global.u16 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    if (sizeof(T) == 1) asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    std::memcpy(&value, &v, sizeof(T));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ void store_global(void* p, T value) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "elements of 1, 2, 4 or 8 bytes");
  const auto at = __cvta_generic_to_global(p);
  if (sizeof(T) == 8) {
    uint64_t v = 0;
    std::memcpy(&v, &value, sizeof(T));
    asm volatile("st.global.u64 [%0], %1;" : : "l"(at), "l"(v) : "memory");
  } else {
    uint32_t v = 0;
    std::memcpy(&v, &value, sizeof(T));
    if (sizeof(T) == 4) asm volatile("st.global.u32 [%0], %1;" : : "l"(at), "r"(v) : "memory");
    if (sizeof(T) == 2) asm volatile("st.global.u16 [%0], %1;" : : "l"(at), "r"(v) : "memory");
    if (sizeof(T) == 1) asm volatile("st.global.u8 [%0], %1;" : : "l"(at), "r"(v) : "memory");
  }
}

#endif

// Arithmetic whose rounding matters: never contracted, never approximate.

#if defined(WSYNC_EMULATE)
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float fma_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float min_f32(float a, float b) { return std::fmin(a, b); }
inline float abs_f32(float a) { return std::fabs(a); }
inline uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * static_cast<uint64_t>(b)) >> 32);
}
#else
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float min_f32(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float abs_f32(float a) { return fabsf(a); }
__device__ __forceinline__ uint32_t mul_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
#endif

// Blocks of a kernel that the current device holds at once: what a persistent grid has. In emulation any number does; a
// few blocks take several turns each.
#if defined(WSYNC_EMULATE)
template <typename Kernel>
cudaError_t resident_blocks(Kernel, int, unsigned int* blocks) {
  *blocks = 3;
  return cudaSuccess;
}
#else
template <typename Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, unsigned int* blocks) {
  int device = 0;
  int processors = 0;
  int per_processor = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0)) {
    return error;
  }
  *blocks = static_cast<unsigned int>(processors * per_processor);
  return cudaSuccess;
}
#endif

// Conversions.

// Two e4m3 codes, `low` in the low byte; finite values.
__device__ __forceinline__ uint32_t cvt_e4m3x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return static_cast<uint32_t>(e4m3_of_f32(low)) | static_cast<uint32_t>(e4m3_of_f32(high)) << 8;
#endif
}

// Two f32 rounded to bf16 (RNE), `low` in the low half; values that stay finite.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t words;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(high), "f"(low));
  return words;
#else
  return static_cast<uint32_t>(bf16_of_f32_bits(bits_of(low))) | static_cast<uint32_t>(bf16_of_f32_bits(bits_of(high)))
                                                                     << 16;
#endif
}

// Two f32 rounded to IEEE halves (RNE), `low` in the low half.
__device__ __forceinline__ uint32_t cvt_f16x2(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t words;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(high), "f"(low));
  return words;
#else
  return static_cast<uint32_t>(f16_of_f32(low)) | static_cast<uint32_t>(f16_of_f32(high)) << 16;
#endif
}

// The values of two e4m3 codes (the low one in the low byte), exact; a NaN stays one.
__device__ __forceinline__ void cvt_f32x2_e4m3(uint16_t codes, float* low, float* high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  asm("cvt.f32.f16 %0, %1;" : "=f"(*low) : "h"(static_cast<uint16_t>(halves)));
  asm("cvt.f32.f16 %0, %1;" : "=f"(*high) : "h"(static_cast<uint16_t>(halves >> 16)));
#else
  *low = f32_of_e4m3(static_cast<uint8_t>(codes));
  *high = f32_of_e4m3(static_cast<uint8_t>(codes >> 8));
#endif
}

// The f32 value of an IEEE half, exact.
__device__ __forceinline__ float cvt_f32_f16(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return f32_of_f16(half);
#endif
}

}  // namespace cuda
}  // namespace wsync
