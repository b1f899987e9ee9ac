// Kernels that do one thing right or wrong, for the tests of the emulator itself: toys SCHEDULE prints what was said.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.cuh"
#include "emulator/guarded.h"

namespace emulator = wsync::emulator;

namespace {

constexpr int kNumThreads = 64;
constexpr uint32_t kAll = 0xffffffffu;

uint32_t self() { return threadIdx.x; }

__global__ void shuffles(uint32_t* out) {
  const uint32_t lane = self() % 32;
  uint32_t wrong = 0;
  wrong += __shfl_sync(kAll, lane, 5) != 5;
  wrong += __shfl_sync(kAll, lane, 5, 8) != lane / 8 * 8 + 5;
  wrong += __shfl_up_sync(kAll, lane, 3) != (lane < 3 ? lane : lane - 3);
  wrong += __shfl_up_sync(kAll, lane, 3, 16) != (lane % 16 < 3 ? lane : lane - 3);
  wrong += __shfl_down_sync(kAll, lane, 9) != (lane + 9 > 31 ? lane : lane + 9);
  wrong += __shfl_xor_sync(kAll, lane * 1.5f, 7) != (lane ^ 7) * 1.5f;
  wrong += __ballot_sync(kAll, lane % 3 == 0) != 0x49249249u;
  wrong += __any_sync(kAll, lane == 31) != 1 || __all_sync(kAll, lane != 31) != 0;
  if (lane < 4) wrong += __shfl_xor_sync(0xfu, lane, 2) != (lane ^ 2);  // a part of a warp by itself
  wrong += __syncthreads_count(self() < 10) != 10;
  out[blockIdx.x * kNumThreads + self()] = wrong;
}

__global__ void warp_order(uint32_t* out, bool ordered) {
  WSYNC_SHARED(uint32_t, cells, kNumThreads);
  cells[self()] = self();
  if (ordered) {
    __syncwarp();
  } else {
    __shfl_sync(kAll, self(), 0);  // a shuffle orders no memory
  }
  out[blockIdx.x * kNumThreads + self()] = cells[self() ^ 1] == (self() ^ 1) ? 0 : 1;
}

__global__ void too_much_shared(uint32_t* out) {
  WSYNC_SHARED(uint32_t, first, 8 << 10);
  WSYNC_SHARED(uint32_t, second, 5 << 10);
  first[self()] = second[self()] = 0;
  out[self()] = 0;
}

__global__ void atomics(unsigned long long* sums) {
  atomicAdd(&sums[0], static_cast<unsigned long long>(self()));
  atomicMax(&sums[1], static_cast<unsigned long long>(self()));
}

__global__ void reads_other_locals(uint32_t* out, uint32_t** shared_pointer) {
  uint32_t mine[4] = {self(), 1, 2, 3};
  if (self() == 0) *shared_pointer = mine;
  __syncthreads();
  out[self()] = (*shared_pointer)[blockIdx.x];
}

__global__ void ends_early(uint32_t* out) {
  if (self() == 40) return;
  __syncthreads();
  out[self()] = 0;
}

__global__ void deep(uint32_t* out, int depth) {
  struct Recursion {
    static uint32_t of(int n, volatile uint32_t* link) {
      volatile uint32_t local[256];
      local[0] = link == nullptr ? 0 : link[0];
      return n == 0 ? local[0] : of(n - 1, local) + local[0];
    }
  };
  out[self()] = Recursion::of(depth, nullptr);
}

template <typename Call>
void report(const char* name, Call call) {
  emulator::clear_failure();
  const std::vector<uint8_t> zeros(8 * 256);
  emulator::GuardedBuffer out("out", zeros.data(), zeros.size(), 0, true);
  call(reinterpret_cast<uint32_t*>(out.data()));
  uint32_t sum = 0;
  for (size_t i = 0; i < 256; ++i) sum += reinterpret_cast<const uint32_t*>(out.data())[i];
  std::printf("%s|%u|%s\n", name, sum, emulator::failure().c_str());
}

}  // namespace

int main(int, char** argv) {
  std::setbuf(stdout, nullptr);  // "deep" kills a build without memory faults as failures
  emulator::catch_memory_faults();
  emulator::set_schedule(static_cast<emulator::Schedule>(std::atoi(argv[1])), 3);
  uint32_t* pointer = nullptr;
  emulator::add_region("pointer", &pointer, sizeof(pointer), true);
  report("shuffles", [](uint32_t* out) { WSYNC_LAUNCH(shuffles, 2, kNumThreads, nullptr, out); });
  report("syncwarp", [](uint32_t* out) { WSYNC_LAUNCH(warp_order, 2, kNumThreads, nullptr, out, true); });
  report("no syncwarp", [](uint32_t* out) { WSYNC_LAUNCH(warp_order, 2, kNumThreads, nullptr, out, false); });
  report("shared", [](uint32_t* out) { WSYNC_LAUNCH(too_much_shared, 1, kNumThreads, nullptr, out); });
  report("atomics", [](uint32_t* out) {
    WSYNC_LAUNCH(atomics, 3, kNumThreads, nullptr, reinterpret_cast<unsigned long long*>(out));
  });
  report("locals", [&](uint32_t* out) { WSYNC_LAUNCH(reads_other_locals, 1, kNumThreads, nullptr, out, &pointer); });
  report("ends", [](uint32_t* out) { WSYNC_LAUNCH(ends_early, 1, kNumThreads, nullptr, out); });
  report("partial warp", [](uint32_t* out) { WSYNC_LAUNCH(warp_order, 1, 40, nullptr, out, true); });
  report("too many", [](uint32_t* out) { WSYNC_LAUNCH(ends_early, 1, 1056, nullptr, out); });
  report("no grid", [](uint32_t* out) { WSYNC_LAUNCH(ends_early, 0, 32, nullptr, out); });
  report("deep", [](uint32_t* out) { WSYNC_LAUNCH(deep, 1, kNumThreads, nullptr, out, 1000); });
  report("shallow", [](uint32_t* out) { WSYNC_LAUNCH(deep, 1, kNumThreads, nullptr, out, 2); });
  return 0;
}
