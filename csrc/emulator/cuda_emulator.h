// CUDA for a plain C++ compiler: kernels run on the CPU, one fiber for each thread, and say what they do wrong.
//
// Builds: plain; with the accesses of kernels reported (-fsanitize=thread without its runtime, see hooks.cpp), which
// finds races, accesses out of bounds and reads of shared memory that nobody wrote; with AddressSanitizer and
// UndefinedBehaviorSanitizer. Tests only: nothing of this is in the library that is shipped.
#pragma once

#include "emulator/atomics.h"
#include "emulator/launch.h"
#include "emulator/machine.h"
#include "emulator/memory.h"
#include "emulator/shared.h"
#include "emulator/sync.h"
#include "emulator/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__
// Arrays in shared memory are declared with WSYNC_SHARED, so that the emulator knows of them.
#define __shared__ static_assert(false, "declare shared memory with WSYNC_SHARED");

#define threadIdx (::wsync::emulator::running->thread)
#define blockIdx (::wsync::emulator::running->block)
#define blockDim (::wsync::emulator::running->block_dim)
#define gridDim (::wsync::emulator::running->grid_dim)

#define WSYNC_CHECK_ALIGNED(pointer, bytes) ::wsync::emulator::check_aligned(pointer, bytes)
