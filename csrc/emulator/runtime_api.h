// The part of CUDA's runtime that launchers need beside launches.
#pragma once

#include <cstddef>

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

namespace wsync::emulator {
// What cudaGetLastError says after a launch that failed. A failure stays until clear_failure().
void note_launch(bool ok);
}  // namespace wsync::emulator

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream);
