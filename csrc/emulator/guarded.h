// Memory between guard pages, whose last byte is as near to the upper one as its alignment allows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wsync::emulator {

class GuardedBuffer {
 public:
  // `like` gives the address modulo 16: what is aligned there is aligned here. Bytes begin as those at `content`.
  GuardedBuffer(const char* name, const void* content, size_t bytes, uint64_t like, bool writable);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool writable() const { return writable_; }
  // Fails if the few bytes around the buffer that no guard page covers were written.
  void check_edges(const char* name) const;

 private:
  static constexpr uint8_t kEdgeByte = 0xe7;
  char* pages_;
  size_t page_bytes_;  // between the guard pages
  uint8_t* data_;
  size_t bytes_;
  bool writable_;
};

}  // namespace wsync::emulator
