// Which instruction set the CPU kernels use: chosen at run time, so that one build serves every machine.
#pragma once

namespace wsync {

// In ascending order: a machine that has one has all before it.
enum class Isa { kScalar, kAvx2, kAvx512 };

// The widest instruction set that both this build and this machine have. kAvx512 means F, BW, DQ and VL.
Isa best_isa();

// "auto" (the widest; the environment variable WSYNC_ISA overrides it), "avx512", "avx2" or "scalar".
// Throws ConfigError on another name or on a set that this machine does not have.
Isa parse_isa(const char* name);

const char* isa_name(Isa isa);

}  // namespace wsync
