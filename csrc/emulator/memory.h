// What kernels may touch, and who touched it. Checks run in builds whose kernels report their accesses (see hooks.cpp)
// and for atomics in all builds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/machine.h"

namespace wsync::emulator {

// Memory that kernels may touch, [begin, begin + bytes). A region of the same address replaces the old one.
void add_region(const char* name, const void* begin, size_t bytes, bool writable);
void remove_region(const void* begin);

// From here on an access of a kernel outside of every region fails. Only builds that report accesses can keep this.
void watch_accesses();
bool watches_accesses();

enum class Access { kRead, kWrite, kAtomic };

// One access of the running thread. Outside of kernels this does nothing.
void check_access(const void* address, size_t bytes, Access access);

// Fails unless the address is a multiple of `alignment`.
void check_aligned(const void* address, size_t alignment);

// "17 bytes beyond the end of 'bucket'", by the nearest region.
std::string describe_address(const void* address);

// Turns a memory fault of a kernel into a failure. Not with AddressSanitizer, which reports them itself.
void catch_memory_faults();

void begin_launch_memory(const Launch& launch);
void end_launch_memory();

}  // namespace wsync::emulator
