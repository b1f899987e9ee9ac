#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "core/errors.h"

namespace wsync {

Isa best_isa() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  return has_avx2 ? Isa::kAvx2 : Isa::kScalar;
#else
  return Isa::kScalar;
#endif
}

Isa parse_isa(const char* name) {
  std::string wanted = name;
  if (wanted == "auto") {
    const char* from_env = std::getenv("WSYNC_ISA");
    if (from_env == nullptr || *from_env == '\0' || std::string(from_env) == "auto") return best_isa();
    wanted = from_env;
  }
  if (wanted == "scalar") return Isa::kScalar;
  if (wanted == "avx2") {
    if (best_isa() == Isa::kAvx2) return Isa::kAvx2;
    throw Error("ConfigError", "instruction set 'avx2' was asked for, but this machine has only 'scalar'");
  }
  throw Error("ConfigError", "instruction set '" + wanted + "' is unknown; known are auto, avx2, scalar");
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx2 ? "avx2" : "scalar"; }

}  // namespace wsync
