// Launches for boxes without 16-byte vectors.
#include "cuda/cells.cuh"
#include "cuda/launch.cuh"
#include "cuda/words.cuh"

namespace wsync {
namespace cuda {

int run_words(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kCellScales:
      return run(cell_scales_kernel, args);
    case kPackWords:
      return run(pack_words_kernel, args);
    case kUnpackWords:
      return run(unpack_words_kernel, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
