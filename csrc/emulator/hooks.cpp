// Kernels compiled with -fsanitize=thread call these before every access to memory. They are our own: libtsan is not
// linked. Functions whose names libtsan defines as well must never meet it in one program.
#include <cstddef>
#include <cstring>

#include "emulator/memory.h"

using wsync::emulator::Access;
using wsync::emulator::check_access;
using wsync::emulator::check_aligned;

#define WSYNC_HOOKS(bytes)                                                              \
  void __tsan_read##bytes(void* p) {                                                    \
    check_aligned(p, bytes);                                                            \
    check_access(p, bytes, Access::kRead);                                              \
  }                                                                                     \
  void __tsan_write##bytes(void* p) {                                                   \
    check_aligned(p, bytes);                                                            \
    check_access(p, bytes, Access::kWrite);                                             \
  }                                                                                     \
  void __tsan_unaligned_read##bytes(void* p) { check_access(p, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* p) { check_access(p, bytes, Access::kWrite); }

extern "C" {
WSYNC_HOOKS(1)
WSYNC_HOOKS(2)
WSYNC_HOOKS(4)
WSYNC_HOOKS(8)
WSYNC_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { check_access(p, bytes, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { check_access(p, bytes, Access::kWrite); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() { wsync::emulator::watch_accesses(); }

// Copies and fills of kernels that are calls (-mmemcpy-strategy and -mmemset-strategy; their objects are linked with
// these names instead of memcpy and memset). What the compiler expands in place it reports itself.
void* wsync_emulator_memcpy(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, Access::kRead);
  check_access(to, bytes, Access::kWrite);
  return std::memcpy(to, from, bytes);
}

void* wsync_emulator_memset(void* to, int value, size_t bytes) {
  check_access(to, bytes, Access::kWrite);
  return std::memset(to, value, bytes);
}
}
