// Atomic operations of CUDA. One thread runs at a time, so plain arithmetic is atomic; the race checker is told.
#pragma once

#include "emulator/memory.h"

namespace wsync::emulator {

// Checks that address is aligned, and that a thread may touch it; see memory.h.
template <typename T>
T* atomic_cell(T* address) {
  check_aligned(address, sizeof(T));
  check_access(address, sizeof(T), Access::kAtomic);
  return address;
}

// Not to be inlined into kernels, whose builds report plain accesses.
#define WSYNC_EMULATOR_ATOMIC(name, type, expression)                                      \
  __attribute__((no_sanitize("thread"), noinline)) inline type name(type* p, type value) { \
    type* cell = ::wsync::emulator::atomic_cell(p);                                        \
    const type old = *cell;                                                                \
    *cell = (expression);                                                                  \
    return old;                                                                            \
  }

#define WSYNC_EMULATOR_ATOMICS(type)                                     \
  WSYNC_EMULATOR_ATOMIC(atomicAdd, type, static_cast<type>(old + value)) \
  WSYNC_EMULATOR_ATOMIC(atomicMax, type, old < value ? value : old)      \
  WSYNC_EMULATOR_ATOMIC(atomicMin, type, value < old ? value : old)      \
  WSYNC_EMULATOR_ATOMIC(atomicExch, type, value)

#define WSYNC_EMULATOR_BIT_ATOMICS(type)                                                                       \
  WSYNC_EMULATOR_ATOMIC(atomicOr, type, old | value)                                                           \
  WSYNC_EMULATOR_ATOMIC(atomicAnd, type, old& value)                                                           \
  __attribute__((no_sanitize("thread"), noinline)) inline type atomicCAS(type* p, type expected, type value) { \
    type* cell = ::wsync::emulator::atomic_cell(p);                                                            \
    const type old = *cell;                                                                                    \
    if (old == expected) *cell = value;                                                                        \
    return old;                                                                                                \
  }

}  // namespace wsync::emulator

WSYNC_EMULATOR_ATOMICS(int)
WSYNC_EMULATOR_ATOMICS(unsigned int)
WSYNC_EMULATOR_ATOMICS(unsigned long long)
WSYNC_EMULATOR_BIT_ATOMICS(int)
WSYNC_EMULATOR_BIT_ATOMICS(unsigned int)
WSYNC_EMULATOR_BIT_ATOMICS(unsigned long long)
WSYNC_EMULATOR_ATOMIC(atomicAdd, float, old + value)

#undef WSYNC_EMULATOR_ATOMIC
#undef WSYNC_EMULATOR_ATOMICS
#undef WSYNC_EMULATOR_BIT_ATOMICS
