// Launches of recipes with known scales and with groups in a row.
#include "cuda/launch.cuh"
#include "cuda/pack_rows.cuh"

namespace wsync {
namespace cuda {

int run_pack_rows(int32_t kernel, const LaunchArgs& args) {
  switch (kernel) {
    case kPackTensor:
      return run(pack_rows_kernel<kSrcBf16, kOpFp8Tensor>, args);
    case kPackTensor + 1:
      return run(pack_rows_kernel<kSrcF32, kOpFp8Tensor>, args);
    case kPackTensor + 2:
      return run(pack_rows_kernel<kSrcF16, kOpFp8Tensor>, args);
    case kPackTensor + 3:
      return run(pack_rows_kernel<kSrcF32Exact, kOpFp8Tensor>, args);
    case kPackChannelScaled:
      return run(pack_rows_kernel<kSrcBf16, kOpFp8ChannelScaled>, args);
    case kPackChannelScaled + 1:
      return run(pack_rows_kernel<kSrcF32, kOpFp8ChannelScaled>, args);
    case kPackChannelScaled + 2:
      return run(pack_rows_kernel<kSrcF16, kOpFp8ChannelScaled>, args);
    case kPackChannelScaled + 3:
      return run(pack_rows_kernel<kSrcF32Exact, kOpFp8ChannelScaled>, args);
    case kPackMxfp8:
      return run(pack_rows_kernel<kSrcBf16, kOpMxfp8>, args);
    case kPackMxfp8 + 1:
      return run(pack_rows_kernel<kSrcF32, kOpMxfp8>, args);
    case kPackMxfp8 + 2:
      return run(pack_rows_kernel<kSrcF16, kOpMxfp8>, args);
    case kPackMxfp8 + 3:
      return run(pack_rows_kernel<kSrcF32Exact, kOpMxfp8>, args);
    case kPackNvfp4:
      return run(pack_rows_kernel<kSrcBf16, kOpNvfp4>, args);
    case kPackNvfp4 + 1:
      return run(pack_rows_kernel<kSrcF32, kOpNvfp4>, args);
    case kPackNvfp4 + 2:
      return run(pack_rows_kernel<kSrcF16, kOpNvfp4>, args);
    case kPackNvfp4 + 3:
      return run(pack_rows_kernel<kSrcF32Exact, kOpNvfp4>, args);
    default:
      return kNotMine;
  }
}

}  // namespace cuda
}  // namespace wsync
