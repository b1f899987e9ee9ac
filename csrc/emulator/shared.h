// Shared memory: static arrays in an arena that is poisoned for every block, with red zones between them.
#pragma once

#include <cstddef>

#include "emulator/machine.h"

namespace wsync::emulator {

// The array declared at this site, the same for all threads of the block. `function` tells the instances of a template
// apart.
void* shared_array(const char* name, const char* function, Site site, size_t bytes, size_t alignment);

enum class SharedSpot { kOutside, kRedZone, kArray };

// Where an address lies, and the name of the array that it lies in or next to.
SharedSpot find_shared(const void* address, size_t bytes, const char** name);

}  // namespace wsync::emulator

#define WSYNC_SHARED(type, name, count)                                              \
  type(&name)[count] = *static_cast<type(*)[count]>(::wsync::emulator::shared_array( \
      #name, __PRETTY_FUNCTION__, {__FILE__, __LINE__}, sizeof(type) * static_cast<size_t>(count), alignof(type)))
