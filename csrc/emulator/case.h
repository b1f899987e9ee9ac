// Cases: descriptors and the memory that they name, as a test writes them to a file. Addresses are those of the process
// that wrote it; the runner moves every buffer and the descriptors' addresses with it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace wsync::emulator {

enum class Call : uint32_t { kPack, kAmax, kScales, kUnpack, kInstalled, kTransform, kDigest };

struct CaseBuffer {
  std::string name;
  uint64_t address;
  bool writable;
  std::vector<uint8_t> content;
};

struct Case {
  Call call;
  uint64_t base;  // address of the bucket, or 0
  uint64_t num_descs;
  std::vector<uint8_t> descs;  // for kDigest: address, bytes, first word
  std::vector<CaseBuffer> buffers;
};

struct Outcome {
  std::string failure;  // empty: none
  uint64_t digest = 0;
  uint64_t bad = 0;
  std::vector<std::vector<uint8_t>> contents;  // of the buffers afterwards
};

// Runs the case in one schedule, in memory of its own.
Outcome run_case(const Case& given);

// Runs it in all schedules; a difference between two of them is a failure.
Outcome run_schedules(const Case& given, uint64_t seed);

}  // namespace wsync::emulator
