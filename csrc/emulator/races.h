// Finds two accesses of one byte by different threads, at least one of them a write, that nothing orders. What orders
// is
// __syncthreads within a block, __syncwarp between its lanes and the end of a launch; shuffles and votes do not, nor
// does the order in which the emulator happens to run threads.
#pragma once

#include <cstddef>

#include "emulator/memory.h"

namespace wsync::emulator {

// Forgets what launches before touched.
void begin_races();

// `shared`: of the block alone, and bytes that no thread wrote must not be read.
void check_race(const void* address, size_t bytes, Access access, bool shared, const char* name);

}  // namespace wsync::emulator
