// Launches of whole rows.
#include "cuda/launch.cuh"
#include "cuda/pack_channel.cuh"

namespace wsync {
namespace cuda {

int run_pack_channel(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kPackChannel:
      return run(pack_channel_kernel<kSrcBf16>, args);
    case kPackChannel + 1:
      return run(pack_channel_kernel<kSrcF32>, args);
    case kPackChannel + 2:
      return run(pack_channel_kernel<kSrcF16>, args);
    case kPackChannel + 3:
      return run(pack_channel_kernel<kSrcF32Exact>, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
