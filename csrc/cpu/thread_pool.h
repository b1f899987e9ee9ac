// A pool of our own: OpenMP runtimes of several libraries in one process spin against each other.
#pragma once

#include <cstddef>
#include <functional>

namespace wsync {

// Calls fn(0) ... fn(num_units - 1), each once, in ascending order of starting, on up to num_threads threads of which
// the caller is one; num_threads <= 0 means as many as the process may run on. Fewer do the work where the process may
// start no more. Returns when all have returned. fn runs in FloatMode, whatever the caller's mode is. Several threads
// may call at the same time. A child of fork() starts its own workers. fn must not throw.
void parallel_for(size_t num_units, int num_threads, const std::function<void(size_t)>& fn);

// Processors that this process may run on.
int num_processors();

}  // namespace wsync
