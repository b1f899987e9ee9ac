#include "cuda/program.h"

#include <algorithm>

namespace wsync {
namespace cuda {

void Builder::add_range(Kernel kernel, uint32_t record, uint64_t total, uint32_t step) {
  for (uint64_t at = 0; at < total; at += step) {
    const auto n = static_cast<uint32_t>(std::min<uint64_t>(step, total - at));
    add_unit(kernel, {record, static_cast<uint32_t>(at), 0, n});
  }
}

namespace {

uint64_t append(std::vector<uint8_t>* bytes, const void* data, size_t num_bytes) {
  bytes->resize((bytes->size() + 15) / 16 * 16);
  const size_t at = bytes->size();
  const auto* from = static_cast<const uint8_t*>(data);
  bytes->insert(bytes->end(), from, from + num_bytes);
  return at;
}

}  // namespace

Program Builder::build() const {
  Program program;
  for (const auto& [kernel, work] : work_) {
    if (work.units.empty()) continue;
    WsyncCudaLaunch launch{};
    launch.kernel = kernel;
    launch.num_units = static_cast<uint32_t>(work.units.size());
    launch.records = append(&program.bytes, work.records.data(), work.records.size());
    launch.units = append(&program.bytes, work.units.data(), work.units.size() * sizeof(Unit));
    program.launches.push_back(launch);
  }
  return program;
}

}  // namespace cuda
}  // namespace wsync
