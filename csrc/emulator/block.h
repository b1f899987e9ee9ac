// What the parts of the emulator know of the block that runs. Kernels do not include this.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/machine.h"

namespace wsync::emulator {

enum class Status : uint8_t { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  Indices indices;
  Context context;
  Stack stack;
  Status status;
  bool predicate;
  int count;  // of true predicates at the last barrier
  const char* operation;
  Site site;
  uint32_t mask;
  uint64_t value;
  bool orders;
  uint64_t gathered[kWarpSize];
  // seen[lane]: up to which __syncwarp of that lane this thread knows what it wrote; its own entry counts its own.
  uint16_t seen[kWarpSize];
};

struct Block {
  const Launch* launch;
  uint64_t serial;  // of the block, counted through all launches
  uint32_t epoch;   // barriers passed
  unsigned num_threads;
  std::vector<Thread> threads;  // grows, never shrinks: stacks are kept
};

// The block whose thread runs now, or null outside of kernels.
Block* running_block();
unsigned running_thread();

const Launch* running_launch();

// Serial number of the first block of the launch that runs, or ran last.
uint64_t first_serial();

// Takes effect in the running thread after a signal: ends the launch.
[[noreturn]] void abandon_launch();

// Shared memory of the block, see shared.h.
void begin_shared();
void end_shared();

}  // namespace wsync::emulator
