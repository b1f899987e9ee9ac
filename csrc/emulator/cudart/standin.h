// Between the two halves of the stand-in: CUDA's headers and the emulator's cannot meet in one file.
#pragma once

namespace wsync::emulator {

// Runs the emulated kernel of this mangled name at once. False: there is none, or it failed; the reason is on stderr.
bool launch_by_name(const char* device_name, const unsigned (&grid)[3], const unsigned (&block)[3], void** arguments);

}  // namespace wsync::emulator
