#include "emulator/guarded.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/fiber.h"
#include "emulator/memory.h"

#if WSYNC_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace wsync::emulator {
namespace {

constexpr size_t kPage = 4096;

void set_poisoned(const void* begin, const void* end, bool poisoned) {
#if WSYNC_EMULATOR_ASAN
  const auto bytes = static_cast<size_t>(static_cast<const char*>(end) - static_cast<const char*>(begin));
  if (poisoned) {
    __asan_poison_memory_region(begin, bytes);
  } else {
    __asan_unpoison_memory_region(begin, bytes);
  }
#else
  (void)begin;
  (void)end;
  (void)poisoned;
#endif
}

}  // namespace

GuardedBuffer::GuardedBuffer(const char* name, const void* content, size_t bytes, uint64_t like, bool writable)
    : bytes_(bytes), writable_(writable) {
  page_bytes_ = (bytes + 16 + kPage - 1) / kPage * kPage;
  void* memory = mmap(nullptr, page_bytes_ + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0 ||
      mprotect(static_cast<char*>(memory) + kPage + page_bytes_, kPage, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a buffer");
    std::abort();
  }
  pages_ = static_cast<char*>(memory) + kPage;
  size_t at = page_bytes_ - bytes;
  at -= (at - like % 16) % 16;
  data_ = reinterpret_cast<uint8_t*>(pages_) + at;
  std::memset(pages_, kEdgeByte, page_bytes_);
  std::memcpy(data_, content, bytes);
  add_region(name, data_, bytes, writable);
  set_poisoned(pages_, data_, true);
  set_poisoned(data_ + bytes_, pages_ + page_bytes_, true);
}

GuardedBuffer::~GuardedBuffer() {
  remove_region(data_);
  set_poisoned(pages_, pages_ + page_bytes_, false);
  munmap(pages_ - kPage, page_bytes_ + 2 * kPage);
}

void GuardedBuffer::check_edges(const char* name) const {
  set_poisoned(pages_, pages_ + page_bytes_, false);
  const auto* begin = reinterpret_cast<const uint8_t*>(pages_);
  for (const uint8_t* p = begin; p < begin + page_bytes_; ++p) {
    if (p == data_) p += bytes_;
    if (p == begin + page_bytes_) break;
    if (*p != kEdgeByte) return fail("out of bounds", "a kernel wrote at byte %td of '%s'", p - data_, name);
  }
}

}  // namespace wsync::emulator
