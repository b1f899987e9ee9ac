#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "api/descriptor_checks.h"
#include "api/descriptor_layout.h"
#include "api/gil.h"
#include "api/register.h"
#include "core/descriptors.h"
#include "core/dtype.h"
#include "core/errors.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace wsync {
namespace {

template <typename Desc>
std::pair<const Desc*, size_t> records(const py::array& array, const char* record) {
  if (array.ndim() != 1 || array.itemsize() != static_cast<py::ssize_t>(sizeof(Desc)) ||
      (array.size() > 1 && array.strides(0) != array.itemsize())) {
    throw Error("ConfigError", std::string(record) + " takes a contiguous vector of records of " +
                                   std::to_string(sizeof(Desc)) + " bytes, but the array has " +
                                   std::to_string(array.ndim()) + " dimensions and items of " +
                                   std::to_string(array.itemsize()) + " bytes");
  }
  return {static_cast<const Desc*>(array.data()), static_cast<size_t>(array.size())};
}

template <typename Desc>
std::pair<const Desc*, size_t> checked_records(const py::array& array, const char* record) {
  const auto found = records<Desc>(array, record);
  for (size_t i = 0; i < found.second; ++i) check(found.first[i], i);
  return found;
}

void* pointer(uint64_t address, size_t nbytes, const char* name) {
  if (address == 0 && nbytes != 0) throw Error("ConfigError", std::string(name) + " is null");
  return reinterpret_cast<void*>(address);
}

py::tuple py_pack(const py::array& array, uint64_t dst_base, int num_threads, const char* isa_name_) {
  const auto [descs, n] = checked_records<PackDesc>(array, "PACK_DESC");
  const Isa isa = parse_isa(isa_name_);
  auto* dst = static_cast<uint8_t*>(pointer(dst_base, n, "dst_base"));
  FirstBad bad;
  uint64_t sum = 0;
  {
    GilRelease release;
    sum = pack(descs, n, dst, num_threads, isa, &bad);
  }
  if (!bad.found()) return py::make_tuple(sum, py::none());
  return py::make_tuple(sum, py::make_tuple(descs[bad.desc()].piece_idx, bad.element()));
}

py::object py_amax(const py::array& array, int num_threads, const char* isa_name_) {
  const auto [descs, n] = checked_records<AmaxDesc>(array, "AMAX_DESC");
  const Isa isa = parse_isa(isa_name_);
  FirstBad bad;
  {
    GilRelease release;
    amax(descs, n, num_threads, isa, &bad);
  }
  if (!bad.found()) return py::none();
  return py::make_tuple(bad.desc(), bad.element());
}

void py_scales_from_amax(const py::array& array) {
  const auto [descs, n] = checked_records<AmaxDesc>(array, "AMAX_DESC");
  for (size_t i = 0; i < n; ++i) {
    if (descs[i].scales == 0 && descs[i].extent[0] * descs[i].extent[1] != 0) refuse("AMAX_DESC", i, "scales is null");
  }
  GilRelease release;
  scales_from_amax(descs, n);
}

uint64_t py_unpack(const py::array& array, uint64_t src_base, int num_threads, const char* isa_name_) {
  const auto [descs, n] = checked_records<UnpackDesc>(array, "UNPACK_DESC");
  const Isa isa = parse_isa(isa_name_);
  const auto* src = static_cast<const uint8_t*>(pointer(src_base, n, "src_base"));
  GilRelease release;
  return unpack(descs, n, src, num_threads, isa);
}

uint64_t py_installed_digest(const py::array& array, int num_threads, const char* isa_name_) {
  const auto [descs, n] = checked_records<UnpackDesc>(array, "UNPACK_DESC");
  const Isa isa = parse_isa(isa_name_);
  GilRelease release;
  return installed_digest(descs, n, num_threads, isa);
}

py::object py_transform(const py::array& array, int num_threads, const char* isa_name_) {
  const auto [descs, n] = checked_records<TransformDesc>(array, "TRANSFORM_DESC");
  const Isa isa = parse_isa(isa_name_);
  FirstBad bad;
  {
    GilRelease release;
    transform(descs, n, num_threads, isa, &bad);
  }
  if (!bad.found()) return py::none();
  return py::make_tuple(descs[bad.desc()].piece_idx, bad.element());
}

uint64_t py_digest(uint64_t address, size_t nbytes, uint64_t first_word, int num_threads, const char* isa_name_) {
  const Isa isa = parse_isa(isa_name_);
  const void* src = pointer(address, nbytes, "address");
  GilRelease release;
  return digest(src, nbytes, first_word, num_threads, isa);
}

void py_memcpy(uint64_t dst, uint64_t src, size_t nbytes, int num_threads) {
  void* to = pointer(dst, nbytes, "dst");
  const void* from = pointer(src, nbytes, "src");
  GilRelease release;
  parallel_memcpy(to, from, nbytes, num_threads);
}

py::array_t<uint8_t> py_e4m3(const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
  py::array_t<uint8_t> codes(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) codes.mutable_data()[i] = e4m3_of_f32(values.data()[i]);
  return codes;
}

}  // namespace

void register_kernels(py::module_& m) {
  using py::arg;
  m.def("pack", &py_pack, arg("descs"), arg("dst_base"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("amax", &py_amax, arg("descs"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("scales_from_amax", &py_scales_from_amax, arg("descs"));
  m.def("unpack", &py_unpack, arg("descs"), arg("src_base"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("installed_digest", &py_installed_digest, arg("descs"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("transform", &py_transform, arg("descs"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("digest", &py_digest, arg("address"), arg("nbytes"), arg("first_word"), arg("num_threads") = 0,
        arg("isa") = "auto");
  m.def("zero_digest", &zero_digest, arg("first_word"), arg("num_words"), py::call_guard<GilRelease>());
  m.def("memcpy", &py_memcpy, arg("dst"), arg("src"), arg("nbytes"), arg("num_threads") = 0);
  m.def("e4m3", &py_e4m3, arg("values"), "e4m3 codes of f32 values, one by one: the scalar codec, for tests.");
  m.def("best_isa", [] { return isa_name(parse_isa("auto")); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
      if (isa <= best_isa()) names.emplace_back(isa_name(isa));
    }
    return names;
  });
  m.def("num_processors", &num_processors);
  m.def("descriptor_layout", &descriptor_layout, "For each record: its size and (field, offset, bytes).");
}

}  // namespace wsync
