#include "emulator/runtime_api.h"

#include <cstring>

#include "emulator/machine.h"

namespace {
cudaError_t last_error = cudaSuccess;
}

namespace wsync::emulator {
void note_launch(bool ok) {
  if (!ok) last_error = failure().rfind("bad launch", 0) == 0 ? cudaErrorInvalidConfiguration : cudaErrorLaunchFailure;
}
}  // namespace wsync::emulator

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    default:
      return "cudaErrorLaunchFailure";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : wsync::emulator::failure().c_str();
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
