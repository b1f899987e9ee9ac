#include "emulator/races.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "emulator/block.h"

namespace wsync::emulator {
namespace {

// Who touched a byte, and when. 0: nobody.
struct Stamp {
  uint64_t serial : 24;  // of the block
  uint64_t epoch : 16;   // barriers of the block before
  uint64_t thread : 10;
  uint64_t clock : 13;  // __syncwarps of the thread since the last barrier, from 1 on
  uint64_t atomic : 1;
};
static_assert(sizeof(Stamp) == 8, "a stamp is one word");

// Two readers are enough to find a later write of a third thread: they are of different warps where there are such.
struct Cell {
  Stamp write;
  Stamp reads[2];
};

constexpr uintptr_t kPageBytes = 4096;
struct Page {
  Cell cells[kPageBytes];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page = 0;
Page* last = nullptr;

Cell* cell_of(uintptr_t address) {
  const uintptr_t page = address / kPageBytes;
  if (last == nullptr || page != last_page) {
    std::unique_ptr<Page>& slot = pages[page];
    if (slot == nullptr) slot = std::make_unique<Page>();
    last = slot.get();
    last_page = page;
  }
  return &last->cells[address % kPageBytes];
}

struct Observer {
  Stamp self;
  const uint16_t* seen;
  uint64_t first_serial;  // stamps of earlier blocks do not count

  bool counts(const Stamp& stamp) const { return stamp.clock != 0 && stamp.serial >= first_serial; }

  // Whether the access that left this stamp happened before whatever this thread does now.
  bool knows(const Stamp& stamp) const {
    if (!counts(stamp)) return true;
    if (stamp.serial != self.serial) return false;
    if (stamp.thread == self.thread || stamp.epoch < self.epoch) return true;
    return stamp.thread / kWarpSize == self.thread / kWarpSize && seen[stamp.thread % kWarpSize] >= stamp.clock;
  }

  bool conflicts(const Stamp& stamp) const { return !(self.atomic && stamp.atomic) && !knows(stamp); }
};

Observer observe(Access access, bool shared) {
  const Block& block = *running_block();
  const unsigned idx = running_thread();
  const Thread& thread = block.threads[idx];
  const uint16_t clock = thread.seen[idx % kWarpSize];
  if (block.epoch >= 1u << 16 || clock >= 1u << 13 || block.serial >= 1u << 24) {
    fail("too long", "%s: more blocks, barriers or __syncwarps than the race checker can count",
         describe_running().c_str());
  }
  return {{block.serial, block.epoch, idx, clock, access == Access::kAtomic},
          thread.seen,
          shared ? block.serial : first_serial()};
}

void fail_race(const Observer& me, const Stamp& other, const char* what, const void* address, const char* name,
               Access access) {
  const unsigned thread = static_cast<unsigned>(other.thread);
  const std::string who = other.serial == me.self.serial ? describe_thread(thread)
                                                         : "thread " + std::to_string(thread) + " of another block";
  fail("race", "%s %s %s, which %s %s, and nothing orders the two: '%s'", describe_running().c_str(),
       access == Access::kRead ? "reads" : "writes", describe_address(address).c_str(), who.c_str(), what, name);
}

void note_read(const Observer& me, Cell* cell) {
  for (Stamp& read : cell->reads) {
    if (me.knows(read)) {
      read = me.self;
      return;
    }
  }
  const Stamp& kept = cell->reads[0];
  if (kept.serial == me.self.serial && kept.thread / kWarpSize == me.self.thread / kWarpSize) return;
  cell->reads[1] = me.self;
}

}  // namespace

void begin_races() {
  last = nullptr;
  pages.clear();
}

void check_race(const void* address, size_t bytes, Access access, bool shared, const char* name) {
  const Observer me = observe(access, shared);
  for (size_t i = 0; i < bytes; ++i) {
    const auto* at = static_cast<const char*>(address) + i;
    Cell* cell = cell_of(reinterpret_cast<uintptr_t>(at));
    if (shared && access != Access::kWrite && !me.counts(cell->write)) {
      return fail("uninitialised", "%s reads %s, which no thread of the block has written", describe_running().c_str(),
                  describe_address(at).c_str());
    }
    if (me.conflicts(cell->write)) return fail_race(me, cell->write, "writes", at, name, access);
    if (access == Access::kRead) {
      note_read(me, cell);
      continue;
    }
    for (const Stamp& read : cell->reads) {
      if (me.conflicts(read)) return fail_race(me, read, "reads", at, name, access);
    }
    std::memset(cell, 0, sizeof(*cell));
    cell->write = me.self;
  }
}

}  // namespace wsync::emulator
