#include "emulator/sync.h"

namespace wsync::emulator {

uint64_t value_of_lane(const char* operation, const uint64_t* values, uint32_t mask, unsigned source, Site site) {
  if ((mask >> source & 1u) == 0) {
    fail("bad mask", "%s reads lane %u in %s at line %d, but mask 0x%08x leaves that lane out",
         describe_running().c_str(), source, operation, site.line, mask);
  }
  return values[source];
}

uint32_t votes(const char* operation, uint32_t mask, bool predicate, Site site) {
  const uint64_t* values = wait_for_lanes(operation, mask, predicate ? 1 : 0, false, site);
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) != 0 && values[lane] != 0) bits |= 1u << lane;
  }
  return bits;
}

unsigned segment_begin(const char* operation, int width) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail("bad mask", "%s gives %s a width of %d lanes", describe_running().c_str(), operation, width);
  }
  return lane_id() & ~static_cast<unsigned>(width - 1);
}

}  // namespace wsync::emulator
