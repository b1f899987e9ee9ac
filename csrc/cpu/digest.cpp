#include "core/digest.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace wsync {
namespace {

constexpr size_t kUnitBytes = size_t{1} << 20;

size_t num_units(size_t nbytes) { return (nbytes + kUnitBytes - 1) / kUnitBytes; }

}  // namespace

uint64_t digest(const void* src, size_t nbytes, uint64_t first_word, int num_threads, Isa isa) {
  const Kernels& k = kernels_for(isa);
  std::atomic<uint64_t> sum{0};
  parallel_for(num_units(nbytes), num_threads, [&](size_t unit) {
    const size_t begin = unit * kUnitBytes;
    const size_t n = std::min(kUnitBytes, nbytes - begin);
    sum.fetch_add(k.digest(static_cast<const uint8_t*>(src) + begin, n, first_word + begin / 8),
                  std::memory_order_relaxed);
  });
  return sum.load();
}

uint64_t zero_digest(uint64_t first_word, uint64_t num_words) {
  uint64_t sum = 0;
  uint64_t key = digest_key(first_word);
  for (uint64_t i = 0; i < num_words; ++i, key += kDigestKey) sum += digest_word(0, key);
  return sum;
}

void parallel_memcpy(void* dst, const void* src, size_t nbytes, int num_threads) {
  if (num_threads == 1) {
    std::memcpy(dst, src, nbytes);
    return;
  }
  parallel_for(num_units(nbytes), num_threads, [&](size_t unit) {
    const size_t begin = unit * kUnitBytes;
    std::memcpy(static_cast<uint8_t*>(dst) + begin, static_cast<const uint8_t*>(src) + begin,
                std::min(kUnitBytes, nbytes - begin));
  });
}

}  // namespace wsync
