#include "emulator/shared.h"

#include <cstring>
#include <vector>

#include "emulator/block.h"

#if WSYNC_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace wsync::emulator {
namespace {

constexpr size_t kRedZone = 128;
constexpr unsigned char kRedByte = 0xb5;
constexpr size_t kMaxArrays = 64;

struct Array {
  const char* name;
  const char* function;
  int line;
  size_t begin;
  size_t bytes;
};

alignas(kRedZone) unsigned char arena[kStaticSharedBytes + 2 * kRedZone * (kMaxArrays + 1)];
std::vector<Array> arrays;
size_t used;     // of the arena, a multiple of kRedZone
size_t counted;  // bytes of arrays, as the device lays them out

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// From `begin` to the next multiple of kRedZone and one zone more.
void close_red_zone(size_t begin) {
  used = round_up(begin, kRedZone) + kRedZone;
  std::memset(arena + begin, kRedByte, used - begin);
#if WSYNC_EMULATOR_ASAN
  __asan_poison_memory_region(arena + begin, used - begin);
#endif
}

void open_red_zone(size_t begin, size_t end) {
#if WSYNC_EMULATOR_ASAN
  __asan_unpoison_memory_region(arena + begin, end - begin);
#else
  (void)begin;
  (void)end;
#endif
}

}  // namespace

void begin_shared() {
  arrays.clear();
  counted = 0;
  open_red_zone(0, sizeof(arena));
  close_red_zone(0);
}

void end_shared() {
  open_red_zone(0, sizeof(arena));
  for (const Array& array : arrays) {
    const size_t end = array.begin + array.bytes;
    for (size_t i = end; i < round_up(end, kRedZone) + kRedZone; ++i) {
      if (arena[i] == kRedByte) continue;
      return fail("red zone", "%s wrote beyond the end of shared array '%s' of %zu bytes, at byte %zu",
                  describe_block().c_str(), array.name, array.bytes, i - array.begin);
    }
  }
}

void* shared_array(const char* name, const char* function, Site site, size_t bytes, size_t alignment) {
  for (const Array& array : arrays) {
    if (array.line == site.line && array.function == function && std::strcmp(array.name, name) == 0) {
      return arena + array.begin;
    }
  }
  counted = round_up(counted, alignment) + bytes;
  if (counted > kStaticSharedBytes || arrays.size() == kMaxArrays) {
    fail("shared memory overflow", "'%s' makes %zu bytes of static arrays in %s, a block may have %zu", name, counted,
         describe_block().c_str(), kStaticSharedBytes);
  }
  const size_t begin = used;
  open_red_zone(begin, begin + bytes);
  std::memset(arena + begin, poison_byte(), bytes);
  close_red_zone(begin + bytes);
  arrays.push_back({name, function, site.line, begin, bytes});
  return arena + begin;
}

SharedSpot find_shared(const void* address, size_t bytes, const char** name) {
  const auto at = static_cast<const unsigned char*>(address);
  *name = "";
  if (at < arena || at >= arena + sizeof(arena)) return SharedSpot::kOutside;
  const auto offset = static_cast<size_t>(at - arena);
  for (const Array& array : arrays) {
    if (offset < array.begin) break;
    *name = array.name;
    if (offset + bytes <= array.begin + array.bytes) return SharedSpot::kArray;
  }
  return SharedSpot::kRedZone;
}

}  // namespace wsync::emulator
