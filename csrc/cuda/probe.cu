#include "cuda/probe.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

void set_reason(WsyncCudaProbe* probe, const char* call, cudaError_t error) {
  std::snprintf(probe->reason, sizeof(probe->reason), "%s: %s (%s)", call, cudaGetErrorName(error),
                cudaGetErrorString(error));
  cudaGetLastError();  // leave no sticky error for the next caller
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int wsync_cuda_probe(WsyncCudaProbe* probe) {
  std::memset(probe, 0, sizeof(*probe));
  cudaRuntimeGetVersion(&probe->runtime_version);
  cudaDriverGetVersion(&probe->driver_version);
  int num_devices = 0;
  if (cudaError_t error = cudaGetDeviceCount(&num_devices)) {
    set_reason(probe, "cudaGetDeviceCount", error);
    return static_cast<int>(error);
  }
  if (num_devices > WSYNC_CUDA_MAX_DEVICES) num_devices = WSYNC_CUDA_MAX_DEVICES;
  for (int i = 0; i < num_devices; ++i) {
    cudaDeviceProp properties;
    if (cudaError_t error = cudaGetDeviceProperties(&properties, i)) {
      set_reason(probe, "cudaGetDeviceProperties", error);
      return static_cast<int>(error);
    }
    WsyncCudaDevice& device = probe->devices[i];
    std::snprintf(device.name, sizeof(device.name), "%s", properties.name);
    device.capability_major = properties.major;
    device.capability_minor = properties.minor;
    device.memory_bytes = properties.totalGlobalMem;
  }
  probe->num_devices = num_devices;
  return 0;
}
