// How every kernel is launched: a persistent grid over the units of one launch.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernel_ids.h"
#include "cuda/records.h"

namespace wsync {
namespace cuda {

struct LaunchArgs {
  const void* records;
  const Unit* units;
  uint32_t num_units;
  uint8_t* base;
  Result* result;
  cudaStream_t stream;
};

constexpr int kNotMine = -1;  // what a family says of a kernel that another one has

template <typename Record>
using KernelFn = void (*)(const Record*, const Unit*, uint32_t, uint8_t*, Result*);

template <typename Record>
int run(KernelFn<Record> kernel, const LaunchArgs& args) {
  unsigned int resident = 0;
  if (const cudaError_t error = resident_blocks(kernel, kThreads, &resident)) return static_cast<int>(error);
  const unsigned int grid = args.num_units < resident ? args.num_units : resident;
  WSYNC_LAUNCH(kernel, grid, kThreads, args.stream, static_cast<const Record*>(args.records), args.units,
               args.num_units, args.base, args.result);
  return static_cast<int>(cudaGetLastError());
}

// The families, one source file each.
int run_pack_block(int32_t kernel, const LaunchArgs& args);
int run_pack_channel(int32_t kernel, const LaunchArgs& args);
int run_pack_rows(int32_t kernel, const LaunchArgs& args);
int run_move(int32_t kernel, const LaunchArgs& args);
int run_words(int32_t kernel, const LaunchArgs& args);
int run_amax(int32_t kernel, const LaunchArgs& args);
int run_transform(int32_t kernel, const LaunchArgs& args);

}  // namespace cuda
}  // namespace wsync
