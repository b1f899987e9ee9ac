// Launches of 128 x 128 blocks.
#include "cuda/launch.cuh"
#include "cuda/pack_block.cuh"

namespace wsync {
namespace cuda {

int run_pack_block(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kPackBlock:
      return run(pack_block_kernel<kSrcBf16>, args);
    case kPackBlock + 1:
      return run(pack_block_kernel<kSrcF32>, args);
    case kPackBlock + 2:
      return run(pack_block_kernel<kSrcF16>, args);
    case kPackBlock + 3:
      return run(pack_block_kernel<kSrcF32Exact>, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
