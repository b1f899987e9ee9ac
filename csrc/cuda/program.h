// Programs: descriptors, already checked, turned into records, units and launches. Host code without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "core/descriptors.h"
#include "cuda/kernel_ids.h"
#include "cuda/ops.h"
#include "cuda/records.h"

namespace wsync {
namespace cuda {

struct Program {
  std::vector<uint8_t> bytes;  // records and units, to be copied to the device; aligned to 16 bytes
  std::vector<WsyncCudaLaunch> launches;
  bool needs_base = false;  // whether a launch writes to a bucket, or reads one
};

// Each throws Error("ConfigError") for a descriptor that the kernels cannot run: elements that are not aligned to their
// size, a box of too many elements.
Program pack_program(const PackDesc* descs, size_t num_descs);
Program amax_program(const AmaxDesc* descs, size_t num_descs);
Program scales_program(const AmaxDesc* descs, size_t num_descs);
Program unpack_program(const UnpackDesc* descs, size_t num_descs);
Program installed_program(const UnpackDesc* descs, size_t num_descs);
Program transform_program(const TransformDesc* descs, size_t num_descs);
// One piece of contiguous bytes.
Program digest_program(uint64_t address, uint64_t num_bytes, uint64_t first_word);

// Collects the work of each kernel. Kernels run in the order of their numbers: kCellScales before kPackWords, which
// reads its scales.
class Builder {
 public:
  // Adds a record to a kernel and returns its index there.
  template <typename Record>
  uint32_t add_record(Kernel kernel, const Record& record) {
    Work& work = work_[kernel];
    const auto* bytes = reinterpret_cast<const uint8_t*>(&record);
    work.records.insert(work.records.end(), bytes, bytes + sizeof(Record));
    return work.num_records++;
  }
  void add_unit(Kernel kernel, const Unit& unit) { work_[kernel].units.push_back(unit); }
  // Adds units of at most `step` for [0, total).
  void add_range(Kernel kernel, uint32_t record, uint64_t total, uint32_t step);

  Program build() const;

 private:
  struct Work {
    std::vector<uint8_t> records;
    uint32_t num_records = 0;
    std::vector<Unit> units;
  };
  std::map<int32_t, Work> work_;
};

}  // namespace cuda
}  // namespace wsync
