// The machine: one block at a time, one fiber for each of its threads, and what they wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator/fiber.h"
#include "emulator/vector_types.h"

namespace wsync::emulator {

constexpr int kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticSharedBytes = size_t{48} << 10;

// In which order blocks, and the threads of a block, get their turn. Right kernels give the same bytes in all.
enum class Schedule { kForward = 0, kReversed = 1, kShuffled = 2 };

// Also seeds the order of kShuffled and what fresh memory holds.
void set_schedule(Schedule schedule, uint64_t seed);
Schedule schedule();
unsigned char poison_byte();

// The first failure of this process since clear_failure(): a kind, a colon and what happened. Empty: none.
const std::string& failure();
void clear_failure();

// Records a failure. Within a kernel the launch ends here, and this does not return to it.
void fail(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

struct Site {
  const char* file;
  int line;
};

struct Indices {
  uint3 thread;
  uint3 block;
  dim3 block_dim;
  dim3 grid_dim;
};

// Of the running thread; null outside of kernels.
extern const Indices* running;

// Waits for all threads of the block at one and the same site. Returns how many of them brought a true `predicate`.
int wait_for_block(const char* operation, bool predicate, Site site);

// Waits for all lanes of `mask` at one and the same site; returns what each of them brought. `orders` says that memory
// is ordered too, as __syncwarp does and shuffles do not.
const uint64_t* wait_for_lanes(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site);

unsigned lane_id();

struct Launch {
  const char* kernel;  // as the launch calls it
  const void* function;
  dim3 grid;
  dim3 block;
  void (*body)(const void* arguments);  // calls the kernel
  const void* arguments;
  size_t argument_bytes;
};

// Runs the grid to its end. False: it failed, see failure().
bool run_launch(const Launch& launch);

// "thread (x, y, z) of block (x, y, z) of <kernel>", for messages.
std::string describe_thread(unsigned thread);
std::string describe_running();
std::string describe_block();

}  // namespace wsync::emulator
