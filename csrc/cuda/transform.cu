// Launches of transforms.
#include "cuda/dequantise.cuh"
#include "cuda/launch.cuh"
#include "cuda/requantise.cuh"

namespace wsync {
namespace cuda {

int run_transform(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kDequantise8:
      return run(dequantise_kernel<kSrcBf16, false>, args);
    case kDequantise8 + 1:
      return run(dequantise_kernel<kSrcF16, false>, args);
    case kDequantise8 + 2:
      return run(dequantise_kernel<kSrcF32, false>, args);
    case kDequantise4:
      return run(dequantise_kernel<kSrcBf16, true>, args);
    case kDequantise4 + 1:
      return run(dequantise_kernel<kSrcF16, true>, args);
    case kDequantise4 + 2:
      return run(dequantise_kernel<kSrcF32, true>, args);
    case kDequantiseElements:
      return run(dequantise_elements_kernel, args);
    case kRequantise:
      return run(requantise_kernel, args);
    case kRequantiseElements:
      return run(requantise_elements_kernel, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
