// The floating-point mode that recipes are defined in: to nearest, with subnormals.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace wsync {

// Sets the mode for this thread and restores the caller's: torch.set_flush_denormal and -ffast-math of other libraries
// change it, and with it the bits of small weights.
class FloatMode {
 public:
#if defined(__SSE2__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
  ~FloatMode() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(0ull));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

#if defined(__SSE2__)
 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked
  unsigned saved_;
#elif defined(__aarch64__)
 private:
  unsigned long long saved_;
#else
  FloatMode() = default;
#endif
};

}  // namespace wsync
