#include "cuda/ops.h"

#include "cuda/launch.cuh"

namespace wsync {
namespace cuda {
namespace {

__global__ void reset_kernel(Result* result) {
  result->digest = 0;
  result->bad = kNoBadKey;
}

int run_kernel(int32_t kernel, const LaunchArgs& args) {
  for (const auto family :
       {run_pack_block, run_pack_channel, run_pack_rows, run_move, run_words, run_amax, run_transform}) {
    if (const int error = family(kernel, args); error != kNotMine) return error;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace
}  // namespace cuda
}  // namespace wsync

#define WSYNC_EXPORT extern "C" __attribute__((visibility("default")))

WSYNC_EXPORT int wsync_cuda_run(const WsyncCudaLaunch* launches, int num_launches, const void* program, void* base,
                                void* result, void* stream) {
  using namespace wsync::cuda;
  const auto* bytes = static_cast<const uint8_t*>(program);
  for (int i = 0; i < num_launches; ++i) {
    const WsyncCudaLaunch& launch = launches[i];
    const LaunchArgs args = {bytes + launch.records,
                             reinterpret_cast<const Unit*>(bytes + launch.units),
                             launch.num_units,
                             static_cast<uint8_t*>(base),
                             static_cast<Result*>(result),
                             static_cast<cudaStream_t>(stream)};
    if (const int error = run_kernel(launch.kernel, args)) return error;
  }
  return 0;
}

WSYNC_EXPORT int wsync_cuda_reset(void* result, void* stream) {
  WSYNC_LAUNCH(wsync::cuda::reset_kernel, 1, 1, static_cast<cudaStream_t>(stream),
               static_cast<wsync::cuda::Result*>(result));
  return static_cast<int>(cudaGetLastError());
}

WSYNC_EXPORT const char* wsync_cuda_error(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
