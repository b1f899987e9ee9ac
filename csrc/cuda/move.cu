// Launches of copies, fills, digests and roundings.
#include "cuda/launch.cuh"
#include "cuda/move.cuh"
#include "cuda/round.cuh"

namespace wsync {
namespace cuda {

int run_move(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kMoveCopy:
      return run(move_kernel<Move::kCopy>, args);
    case kMoveFill:
      return run(move_kernel<Move::kFill>, args);
    case kMoveDigest:
      return run(move_kernel<Move::kDigest>, args);
    case kRoundF32:
      return run(round_kernel<kSrcF32>, args);
    case kRoundF16:
      return run(round_kernel<kSrcF16>, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
