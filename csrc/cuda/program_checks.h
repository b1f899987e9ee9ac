// Refusals of what the CPU takes and CUDA does not, and predicates of the 16-byte road.
#pragma once

#include <cstdint>
#include <string>

#include "core/errors.h"
#include "cuda/records.h"

namespace wsync {
namespace cuda {

constexpr uint64_t kMaxIndex = (uint64_t{1} << 31) - 1;  // of vectors, words and cells of one descriptor
constexpr uint64_t kMaxDescs = (uint64_t{1} << (64 - kElementBits)) - 1;

[[noreturn]] inline void refuse_for_cuda(const char* record, size_t index, const std::string& what) {
  throw Error("ConfigError", std::string(record) + "[" + std::to_string(index) + "] cannot run on a GPU: " + what);
}

inline void check_count(const char* record, size_t num_descs) {
  if (num_descs <= kMaxDescs) return;
  throw Error("ConfigError", std::string(record) + " has " + std::to_string(num_descs) + " descriptors, more than " +
                                 std::to_string(kMaxDescs) + " that one launch can take");
}

// Elements lie on multiples of their size: `what` names the address.
inline void check_aligned(const char* record, size_t index, const char* what, uint64_t address, int64_t elem_bytes) {
  if (address % static_cast<uint64_t>(elem_bytes) == 0) return;
  refuse_for_cuda(record, index,
                  std::string(what) + " is at " + std::to_string(address) + ", not a multiple of its " +
                      std::to_string(elem_bytes) + " bytes an element");
}

inline void check_index(const char* record, size_t index, uint64_t count, const char* what) {
  if (count <= kMaxIndex) return;
  refuse_for_cuda(
      record, index,
      "it has " + std::to_string(count) + " " + what + ", more than " + std::to_string(kMaxIndex) + "; cut the box");
}

inline bool is_vector(uint64_t address) { return address % 16 == 0; }
inline bool is_vector(int64_t bytes) { return bytes % 16 == 0; }

}  // namespace cuda
}  // namespace wsync
