#include "emulator/machine.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "emulator/block.h"
#include "emulator/memory.h"

namespace wsync::emulator {

const Indices* running = nullptr;

namespace {

struct Machine {
  Schedule schedule = Schedule::kForward;
  std::mt19937_64 random{0};
  std::string failure;
  Block block{};
  bool in_kernel = false;
  unsigned current = 0;
  Context scheduler;
  uint64_t next_serial = 1;
  uint64_t first_serial = 1;
  unsigned char poison = 0xcb;
};
Machine machine;
Indices indices;  // of the running thread: kernels read them, and must not reach into `machine`

uint3 unflatten(uint64_t index, dim3 extent) {
  return {static_cast<unsigned>(index % extent.x), static_cast<unsigned>(index / extent.x % extent.y),
          static_cast<unsigned>(index / extent.x / extent.y)};
}

template <typename T>
void order(std::vector<T>* turns) {
  std::iota(turns->begin(), turns->end(), T{0});
  if (machine.schedule == Schedule::kReversed) std::reverse(turns->begin(), turns->end());
  if (machine.schedule == Schedule::kShuffled) std::shuffle(turns->begin(), turns->end(), machine.random);
}

void thread_main() {
  entered_context(&machine.scheduler);
  const Launch& launch = *machine.block.launch;
  launch.body(launch.arguments);
  Thread& self = machine.block.threads[machine.current];
  self.status = Status::kDone;
  switch_context(&self.context, &machine.scheduler, true);
  std::abort();  // a thread that is done gets no turn
}

void resume(unsigned idx) {
  Thread& thread = machine.block.threads[idx];
  machine.current = idx;
  machine.in_kernel = true;
  indices = thread.indices;
  running = &indices;
  switch_context(&machine.scheduler, &thread.context);
  running = nullptr;
  machine.in_kernel = false;
}

void pause(Thread* self, Status status) {
  self->status = status;
  switch_context(&self->context, &machine.scheduler);
}

std::string at(const Thread& thread) {
  const char* slash = std::strrchr(thread.site.file, '/');
  return std::string(thread.operation) + " (" + (slash == nullptr ? thread.site.file : slash + 1) + ":" +
         std::to_string(thread.site.line) + ")";
}

bool same_site(const Thread& a, const Thread& b) {
  const auto same = [](const char* x, const char* y) { return x == y || std::strcmp(x, y) == 0; };
  return a.site.line == b.site.line && same(a.site.file, b.site.file) && same(a.operation, b.operation);
}

// The kernel's own name where the program exports it, or what the launch calls it.
std::string kernel_name(const Launch& launch) {
  Dl_info info{};
  if (dladdr(launch.function, &info) == 0 || info.dli_sname == nullptr) return launch.kernel;
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : info.dli_sname;
  std::free(readable);
  return name.substr(0, name.find('('));
}

std::string where(unsigned idx) {
  const Thread& thread = machine.block.threads[idx];
  return describe_thread(idx) + (thread.status == Status::kDone ? " has ended" : " waits at " + at(thread));
}

// A lane of the mask of `idx` that will not come, because it does not exist, has ended, or waits elsewhere.
void fail_missing_lane(unsigned idx) {
  const Block& block = machine.block;
  const Thread& thread = block.threads[idx];
  const unsigned first = idx - idx % kWarpSize;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((thread.mask >> lane & 1u) == 0) continue;
    const unsigned other = first + lane;
    if (other >= block.num_threads) {
      return fail("missing lane", "%s with mask 0x%08x, but lane %u does not exist", where(idx).c_str(), thread.mask,
                  lane);
    }
    const Thread& peer = block.threads[other];
    if (peer.status == Status::kAtWarp && peer.mask == thread.mask && same_site(peer, thread)) continue;
    return fail("missing lane", "%s with mask 0x%08x, but %s", where(idx).c_str(), thread.mask, where(other).c_str());
  }
}

// No thread can run and the block is not done: either all are at one barrier, or something is wrong.
bool pass_barrier() {
  Block& block = machine.block;
  unsigned first = block.num_threads;
  for (unsigned i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.status == Status::kAtWarp) {
      fail_missing_lane(i);
      return false;
    }
    if (thread.status == Status::kAtBarrier && first == block.num_threads) first = i;
  }
  int count = 0;
  for (unsigned i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.status != Status::kAtBarrier || !same_site(thread, block.threads[first])) {
      fail("barrier divergence", "%s, but %s", where(first).c_str(), where(i).c_str());
      return false;
    }
    count += thread.predicate;
  }
  ++block.epoch;
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    thread.status = Status::kReady;
    thread.count = count;
    std::memset(thread.seen, 0, sizeof(thread.seen));
    thread.seen[i % kWarpSize] = 1;
  }
  return true;
}

void begin_block(uint64_t index) {
  Block& block = machine.block;
  const Launch& launch = *block.launch;
  block.serial = machine.next_serial++;
  block.epoch = 0;
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    if (thread.stack.low == nullptr) thread.stack = make_stack();
    thread.indices = {unflatten(i, launch.block), unflatten(index, launch.grid), launch.block, launch.grid};
    thread.status = Status::kReady;
    std::memset(thread.seen, 0, sizeof(thread.seen));
    thread.seen[i % kWarpSize] = 1;
    start_context(&thread.context, thread.stack, thread_main);
  }
}

bool run_block(uint64_t index, std::vector<unsigned>* turns) {
  begin_block(index);
  begin_shared();
  for (bool done = false; !done;) {
    order(turns);
    bool ran = false;
    done = true;
    for (const unsigned idx : *turns) {
      const Thread& thread = machine.block.threads[idx];
      if (thread.status == Status::kReady) {
        resume(idx);
        if (!machine.failure.empty()) return false;
        ran = true;
      }
      done = done && thread.status == Status::kDone;
    }
    if (!done && !ran && !pass_barrier()) return false;
  }
  end_shared();
  return machine.failure.empty();
}

// Whether every lane of the mask of `self` waits where it does. `first` is the thread that is lane 0.
bool all_lanes_wait(const Thread& self, unsigned first) {
  const Block& block = machine.block;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    // Lanes that come last are looked at first.
    const unsigned lane = machine.schedule == Schedule::kReversed ? i : kWarpSize - 1 - i;
    if ((self.mask >> lane & 1u) == 0) continue;
    if (first + lane >= block.num_threads) return false;
    const Thread& peer = block.threads[first + lane];
    if (peer.status != Status::kAtWarp || peer.mask != self.mask || !same_site(peer, self)) return false;
  }
  return true;
}

// Hands every lane what all of them brought.
void release_lanes(uint32_t mask, unsigned first, bool orders) {
  uint64_t gathered[kWarpSize] = {};
  uint16_t seen[kWarpSize] = {};
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const Thread& peer = machine.block.threads[first + lane];
    gathered[lane] = peer.value;
    for (int i = 0; orders && i < kWarpSize; ++i) seen[i] = std::max(seen[i], peer.seen[i]);
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    Thread& peer = machine.block.threads[first + lane];
    std::memcpy(peer.gathered, gathered, sizeof(gathered));
    peer.status = Status::kReady;
    if (!orders) continue;
    std::memcpy(peer.seen, seen, sizeof(seen));
    ++peer.seen[lane];
  }
}

bool check_launch(const Launch& launch) {
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const dim3& grid = launch.grid;
  const bool grid_ok =
      grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 0xffffu && grid.z <= 0xffffu;
  if (threads == 0 || threads > kMaxThreads || launch.block.z > 64 || !grid_ok) {
    fail("bad launch", "%s with a grid of (%u, %u, %u) and a block of (%u, %u, %u)", launch.kernel, grid.x, grid.y,
         grid.z, launch.block.x, launch.block.y, launch.block.z);
  }
  return machine.failure.empty();
}

}  // namespace

void set_schedule(Schedule schedule, uint64_t seed) {
  static constexpr unsigned char kPoison[] = {0xcb, 0x5a, 0xff};
  machine.schedule = schedule;
  machine.random.seed(seed);
  machine.poison = kPoison[static_cast<int>(schedule)];
}

Schedule schedule() { return machine.schedule; }
unsigned char poison_byte() { return machine.poison; }

const std::string& failure() { return machine.failure; }
void clear_failure() { machine.failure.clear(); }

void fail(const char* kind, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  if (machine.failure.empty()) machine.failure = std::string(kind) + ": " + message;
  if (machine.in_kernel) abandon_launch();
}

void abandon_launch() {
  Thread& self = machine.block.threads[machine.current];
  self.status = Status::kDone;
  switch_context(&self.context, &machine.scheduler, true);
  std::abort();  // a failed launch gives no thread another turn
}

int wait_for_block(const char* operation, bool predicate, Site site) {
  Thread& self = machine.block.threads[machine.current];
  self.operation = operation;
  self.site = site;
  self.predicate = predicate;
  pause(&self, Status::kAtBarrier);
  return self.count;
}

const uint64_t* wait_for_lanes(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site) {
  const unsigned lane = lane_id();
  const unsigned first = machine.current - lane;
  Thread& self = machine.block.threads[machine.current];
  self.operation = operation;
  self.site = site;
  self.mask = mask;
  self.value = value;
  self.orders = orders;
  if ((mask >> lane & 1u) == 0) {
    fail("bad mask", "%s calls %s with mask 0x%08x, which leaves out its own lane %u", describe_running().c_str(),
         at(self).c_str(), mask, lane);
  }
  self.status = Status::kAtWarp;
  if (!all_lanes_wait(self, first)) {
    switch_context(&self.context, &machine.scheduler);  // the last lane to come lets the others go
  } else {
    release_lanes(mask, first, orders);
  }
  return self.gathered;
}

unsigned lane_id() { return machine.current % kWarpSize; }

bool run_launch(const Launch& launch) {
  if (!machine.failure.empty() || !check_launch(launch)) return false;
  machine.block.launch = &launch;
  machine.block.num_threads = launch.block.x * launch.block.y * launch.block.z;
  if (machine.block.threads.size() < machine.block.num_threads) machine.block.threads.resize(machine.block.num_threads);
  machine.first_serial = machine.next_serial;
  begin_launch_memory(launch);
  std::vector<uint64_t> blocks(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  order(&blocks);
  std::vector<unsigned> turns(machine.block.num_threads);
  for (const uint64_t index : blocks) {
    if (!run_block(index, &turns)) break;
  }
  end_launch_memory();
  return machine.failure.empty();
}

Block* running_block() { return machine.in_kernel ? &machine.block : nullptr; }
unsigned running_thread() { return machine.current; }
const Launch* running_launch() { return machine.block.launch; }
uint64_t first_serial() { return machine.first_serial; }

std::string describe_thread(unsigned thread) {
  const uint3 i = machine.block.threads[thread].indices.thread;
  char text[64];
  std::snprintf(text, sizeof(text), "thread (%u, %u, %u) of ", i.x, i.y, i.z);
  return text + describe_block();
}

std::string describe_running() { return describe_thread(machine.current); }

std::string describe_block() {
  const uint3 i = machine.block.threads[0].indices.block;
  char text[64];
  std::snprintf(text, sizeof(text), "block (%u, %u, %u) of ", i.x, i.y, i.z);
  return text + kernel_name(*machine.block.launch);
}

}  // namespace wsync::emulator
