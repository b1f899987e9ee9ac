#include "emulator/memory.h"

#include <signal.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/block.h"
#include "emulator/races.h"
#include "emulator/shared.h"

#if !WSYNC_EMULATOR_ASAN && !defined(WSYNC_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace wsync::emulator {
namespace {

struct Region {
  std::string name;
  const char* begin;
  const char* end;
  bool writable;
};

std::vector<Region> regions;  // sorted
bool watching = false;

const Region* region_of(const char* at) {
  static size_t last = 0;
  if (last < regions.size() && at >= regions[last].begin && at < regions[last].end) return &regions[last];
  const auto above =
      std::upper_bound(regions.begin(), regions.end(), at, [](const char* p, const Region& r) { return p < r.begin; });
  if (above == regions.begin()) return nullptr;
  last = static_cast<size_t>(above - regions.begin() - 1);
  return at < regions[last].end ? &regions[last] : nullptr;
}

// Constants and tables of the program itself.
bool in_image(const char* at) { return at >= __ehdr_start && at < _end; }

const char* verb(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
}

void fail_outside(const void* address, size_t bytes, Access access) {
  const Block& block = *running_block();
  for (unsigned i = 0; i < block.num_threads; ++i) {
    if (!block.threads[i].stack.holds(address)) continue;
    fail("out of bounds", "%s %s %zu bytes of the local variables of %s", describe_running().c_str(), verb(access),
         bytes, describe_thread(i).c_str());
  }
  fail("out of bounds", "%s %s %zu bytes %s", describe_running().c_str(), verb(access), bytes,
       describe_address(address).c_str());
}

}  // namespace

void add_region(const char* name, const void* begin, size_t bytes, bool writable) {
  remove_region(begin);
  const Region region{name, static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes, writable};
  const auto at = std::upper_bound(regions.begin(), regions.end(), region,
                                   [](const Region& a, const Region& b) { return a.begin < b.begin; });
  regions.insert(at, region);
}

void remove_region(const void* begin) {
  regions.erase(std::remove_if(regions.begin(), regions.end(), [&](const Region& r) { return r.begin == begin; }),
                regions.end());
}

void watch_accesses() { watching = true; }
bool watches_accesses() { return watching; }

void check_aligned(const void* address, size_t alignment) {
  if (running == nullptr || reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  fail("misaligned", "%s accesses %zu bytes at %p, %s", describe_running().c_str(), alignment, address,
       describe_address(address).c_str());
}

void check_access(const void* address, size_t bytes, Access access) {
  if (!watching || running == nullptr) return;
  if (running_block()->threads[running_thread()].stack.holds(address)) return;
  const char* name;
  const SharedSpot spot = find_shared(address, bytes, &name);
  if (spot == SharedSpot::kArray) return check_race(address, bytes, access, true, name);
  if (spot == SharedSpot::kRedZone) return fail_outside(address, bytes, access);
  const char* at = static_cast<const char*>(address);
  const Region* region = region_of(at);
  if (region == nullptr) {
    if (!in_image(at)) fail_outside(address, bytes, access);
    return;
  }
  if (at + bytes > region->end) return fail_outside(address, bytes, access);
  if (access != Access::kRead && !region->writable) {
    return fail("read-only", "%s %s %zu bytes %s", describe_running().c_str(), verb(access), bytes,
                describe_address(address).c_str());
  }
  check_race(address, bytes, access, false, region->name.c_str());
}

std::string describe_address(const void* address) {
  const char* name;
  if (find_shared(address, 1, &name) != SharedSpot::kOutside) {
    return "in or beyond shared array '" + std::string(name) + "'";
  }
  const char* at = static_cast<const char*>(address);
  const Region* nearest = nullptr;
  int64_t least = INT64_MAX;
  for (const Region& r : regions) {
    const int64_t distance = at < r.begin ? r.begin - at : at >= r.end ? at - r.end + 1 : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = &r;
  }
  char text[256];
  if (nearest == nullptr || least > (int64_t{1} << 24)) {
    std::snprintf(text, sizeof(text), "at %p, near no region", address);
  } else if (at < nearest->begin) {
    std::snprintf(text, sizeof(text), "%td bytes before '%s'", nearest->begin - at, nearest->name.c_str());
  } else {
    std::snprintf(text, sizeof(text), "at byte %td of '%s', which has %td", at - nearest->begin, nearest->name.c_str(),
                  nearest->end - nearest->begin);
  }
  return text;
}

void begin_launch_memory(const Launch& launch) {
  add_region("kernel arguments", launch.arguments, launch.argument_bytes, false);
  begin_races();
}

void end_launch_memory() { remove_region(running_launch()->arguments); }

#if WSYNC_EMULATOR_ASAN || defined(WSYNC_EMULATOR_UCONTEXT)

void catch_memory_faults() {}

#else

namespace {

alignas(16) char fault_stack[64 << 10];
const void* fault_address;

// Runs on a stack of its own: that of the thread may be the one that overflowed.
[[noreturn]] void fail_fault() {
  const Stack& stack = running_block()->threads[running_thread()].stack;
  const char* at = static_cast<const char*>(fault_address);
  if (at < stack.low && at >= stack.low - 4096) {
    fail("memory fault", "%s needs more than %zu bytes of local variables", describe_running().c_str(), stack.bytes);
  } else if (at == nullptr) {  // what the processor says of misaligned vector accesses too
    fail("memory fault", "%s accesses memory misaligned or at no valid address", describe_running().c_str());
  } else {
    fail("memory fault", "%s accesses memory %s", describe_running().c_str(), describe_address(at).c_str());
  }
  std::abort();
}

void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (running == nullptr) {  // not a kernel: die as if nobody had asked
    signal(signal_number, SIG_DFL);
    return;
  }
  fault_address = info->si_addr;
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(fault_stack + sizeof(fault_stack) - 8));
  registers[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(&fail_fault));
}

}  // namespace

void catch_memory_faults() {
  static char signal_stack[64 << 10];
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof(signal_stack);
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

#endif

}  // namespace wsync::emulator
