#include <pybind11/numpy.h>

#include <string>

#include "api/gil.h"
#include "api/register.h"
#include "core/errors.h"
#include "cpu/delta.h"

namespace py = pybind11;

namespace wsync {
namespace {

uint8_t* address(uint64_t value, const char* name) {
  if (value == 0) throw Error("ConfigError", std::string(name) + " is null");
  return reinterpret_cast<uint8_t*>(value);
}

void check_cut(const DeltaCut& cut, size_t index) {
  const std::string which = "cuts[" + std::to_string(index) + "]: ";
  if (cut.span == 0 || cut.span % kStripeAlign != 0 || cut.span > kMaxStripeBytes) {
    throw Error("ConfigError", which + "span is " + std::to_string(cut.span) + ", not a multiple of " +
                                   std::to_string(kStripeAlign) + " up to " + std::to_string(kMaxStripeBytes));
  }
  if (cut.kind != kStripeWords && cut.kind != kStripeBytes) {
    throw Error("ConfigError", which + "kind is " + std::to_string(cut.kind) + ", not 2 (words) or 3 (bytes)");
  }
}

py::tuple py_delta_encode(uint64_t fresh, uint64_t base, uint64_t out, const py::array_t<uint32_t>& cuts,
                          uint64_t base_seq, uint64_t base_digest, int num_threads, const char* isa_name_) {
  if (cuts.ndim() != 2 || cuts.shape(1) != 2 || (cuts.flags() & py::array::c_style) == 0) {
    throw Error("ConfigError", "cuts must be a contiguous u32 array of (span, kind)");
  }
  const auto* found = reinterpret_cast<const DeltaCut*>(cuts.data());
  const auto num_cuts = static_cast<size_t>(cuts.shape(0));
  uint64_t used_bytes = 0;
  for (size_t i = 0; i < num_cuts; ++i) {
    check_cut(found[i], i);
    used_bytes += found[i].span;
  }
  if (used_bytes >> 32 != 0) throw Error("ConfigError", "a bucket of " + std::to_string(used_bytes) + " bytes");
  const Isa isa = parse_isa(isa_name_);
  const auto* const new_bytes = address(fresh, "fresh");
  auto *const base_bytes = address(base, "base"), *const code = address(out, "out");
  DeltaResult result{};
  {
    GilRelease release;
    result = delta_encode(new_bytes, base_bytes, code, found, num_cuts, {base_seq, base_digest}, num_threads, isa);
  }
  return py::make_tuple(result.num_bytes, result.num_changed, result.num_elements);
}

void py_delta_apply(uint64_t bucket, uint64_t used_bytes, uint64_t code, uint64_t num_bytes, uint64_t base_seq,
                    uint64_t base_digest, int num_threads, const char* isa_name_) {
  const Isa isa = parse_isa(isa_name_);
  auto *const bytes = address(bucket, "bucket"), *const encoded = address(code, "code");
  GilRelease release;
  delta_apply(bytes, used_bytes, encoded, num_bytes, {base_seq, base_digest}, num_threads, isa);
}

}  // namespace

void register_delta(py::module_& m) {
  using py::arg;
  m.def("delta_encode", &py_delta_encode, arg("fresh"), arg("base"), arg("out"), arg("cuts"), arg("base_seq"),
        arg("base_digest"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("delta_apply", &py_delta_apply, arg("bucket"), arg("used_bytes"), arg("code"), arg("num_bytes"),
        arg("base_seq"), arg("base_digest"), arg("num_threads") = 0, arg("isa") = "auto");
  m.attr("DELTA_MAX_STRIPE_BYTES") = kMaxStripeBytes;
}

}  // namespace wsync
