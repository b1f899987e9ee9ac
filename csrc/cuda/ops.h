// What libwsync_cuda.so offers beside its probe. Plain C, since the library is opened with dlopen on first use.
//
// A program is compiled on the host (cuda/program.h): bytes that are copied to the device once, and launches that point
// into them. Every call runs on `stream`, in order, and returns before its work is done. The return value is a
// cudaError_t.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct WsyncCudaLaunch {
  int32_t kernel;  // a wsync::cuda::Kernel
  uint32_t num_units;
  uint64_t records;  // bytes from the program's beginning
  uint64_t units;
} WsyncCudaLaunch;

// Runs the launches of a program one after the other.
//
// program: the program's bytes on the device. base: the bucket on the device, or null where no descriptor names one.
// result: 16 bytes on the device, the digest and the key of the first bad element; wsync_cuda_reset sets it.
typedef int (*WsyncCudaRunFn)(const WsyncCudaLaunch* launches, int num_launches, const void* program, void* base,
                              void* result, void* stream);

// Sets `result` to a digest of 0 and no bad element.
typedef int (*WsyncCudaResetFn)(void* result, void* stream);

// The name of a cudaError_t, such as "cudaErrorInvalidValue".
typedef const char* (*WsyncCudaErrorFn)(int error);

#ifdef __cplusplus
}
#endif
