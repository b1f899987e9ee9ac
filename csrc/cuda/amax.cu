// Launches of maxima and of scales.
#include "cuda/amax.cuh"
#include "cuda/launch.cuh"

namespace wsync {
namespace cuda {

int run_amax(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kAmaxElements:
      return run(amax_kernel<0>, args);
    case kAmaxVectors16:
      return run(amax_kernel<2>, args);
    case kAmaxVectors32:
      return run(amax_kernel<4>, args);
    case kScales:
      return run(scales_kernel, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
