// Which instruction set the CPU kernels use: chosen at run time, so that one build serves every machine.
#pragma once

namespace wsync {

enum class Isa { kScalar, kAvx2 };

// The widest instruction set that both this build and this machine have.
Isa best_isa();

// "auto" (the widest; the environment variable WSYNC_ISA overrides it), "avx2" or "scalar".
// Throws ConfigError on another name or on a set that this machine does not have.
Isa parse_isa(const char* name);

const char* isa_name(Isa isa);

}  // namespace wsync
