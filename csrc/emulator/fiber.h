// Fibers: one for each CUDA thread of a block, switched by hand on one thread of the operating system.
#pragma once

#include <cstddef>

// 1 where kernels are compiled with AddressSanitizer. The emulator itself need not be.
#if !defined(WSYNC_EMULATOR_ASAN)
#if defined(__SANITIZE_ADDRESS__)
#define WSYNC_EMULATOR_ASAN 1
#else
#define WSYNC_EMULATOR_ASAN 0
#endif
#endif

#if !defined(__x86_64__) && !defined(WSYNC_EMULATOR_UCONTEXT)
#define WSYNC_EMULATOR_UCONTEXT 1
#endif
#if defined(WSYNC_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace wsync::emulator {

// A stack with a guard page below. Stacks live until the process ends and are used again by the next block.
struct Stack {
  char* low = nullptr;
  size_t bytes = 0;
  bool holds(const void* p) const {
    return p >= static_cast<const void*>(low) && p < static_cast<const void*>(low + bytes);
  }
};
Stack make_stack();

// Where a fiber, or the scheduler, stopped.
struct Context {
#if defined(WSYNC_EMULATOR_UCONTEXT)
  ucontext_t state;
#else
  void* sp = nullptr;
#endif
  const void* stack_low = nullptr;  // what AddressSanitizer wants to know of the place it returns to
  size_t stack_bytes = 0;
};

// Prepares `context` so that the first switch to it calls entry() on `stack`. entry must not return.
void start_context(Context* context, const Stack& stack, void (*entry)());

// Stops here, goes on there. `leaving` says that `from` never runs again.
void switch_context(Context* from, Context* to, bool leaving = false);

// The first thing that entry() does.
void entered_context(Context* from);

}  // namespace wsync::emulator
