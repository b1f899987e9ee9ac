#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "core/errors.h"

namespace wsync {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512};

Isa detect() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2")) return Isa::kScalar;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kScalar;
#endif
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa parse_isa(const char* name) {
  std::string wanted = name;
  if (wanted == "auto") {
    const char* from_env = std::getenv("WSYNC_ISA");
    if (from_env == nullptr || *from_env == '\0' || std::string(from_env) == "auto") return best_isa();
    wanted = from_env;
  }
  for (const Isa isa : kAll) {
    if (wanted != isa_name(isa)) continue;
    if (isa <= best_isa()) return isa;
    throw Error("ConfigError", "instruction set '" + wanted + "' was asked for, but the widest of this machine is '" +
                                   isa_name(best_isa()) + "'");
  }
  throw Error("ConfigError", "instruction set '" + wanted + "' is unknown; known are auto, avx512, avx2, scalar");
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace wsync
