#include <pybind11/numpy.h>

#include <cstring>
#include <string>
#include <utility>

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

[[noreturn]] void refuse(const char* record, size_t index, const std::string& what) {
  throw Error("ConfigError", std::string(record) + "[" + std::to_string(index) + "]: " + what);
}

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

template <int kDims>
bool check_extents(const char* record, size_t index, const int64_t (&extent)[kDims]) {
  bool empty = false;
  for (const int64_t n : extent) {
    if (n < 0) refuse(record, index, "extent " + std::to_string(n) + " is negative");
    empty = empty || n == 0;
  }
  return !empty;
}

void check_elem_bytes(const char* record, size_t index, int32_t n) {
  if (n != 1 && n != 2 && n != 4 && n != 8) {
    refuse(record, index, "elem_bytes is " + std::to_string(n) + ", not one of 1, 2, 4, 8");
  }
}

void check_phases(const char* record, size_t index, int32_t row_phase, int32_t col_phase) {
  for (const int32_t phase : {row_phase, col_phase}) {
    if (phase < 0 || phase >= kScaleBlock)
      refuse(record, index, "phase " + std::to_string(phase) + " is outside 0..127");
  }
}

void check_float_source(const char* record, size_t index, int32_t src_dtype) {
  if (src_dtype < kSrcBf16 || src_dtype > kSrcF32Exact) {
    refuse(record, index, "src_dtype " + std::to_string(src_dtype) + " is not one of bf16, f32 and f16 (1..4)");
  }
}

// A copy keeps its bytes, so it knows no dtype that is rounded.
void check_copied_source(const char* record, size_t index, int32_t src_dtype) {
  if (src_dtype < kSrcBytes || src_dtype > kSrcF64 || src_dtype == kSrcF32) {
    refuse(record, index, "src_dtype " + std::to_string(src_dtype) + " cannot be copied (0, 1, 3, 4, 5)");
  }
}

void check_source_bytes(const char* record, size_t index, int32_t src_dtype, int32_t elem_bytes) {
  const int32_t expected = source_bytes(src_dtype);
  if (expected != 0 && elem_bytes != expected) {
    refuse(record, index,
           "elem_bytes is " + std::to_string(elem_bytes) + ", but src_dtype " + std::to_string(src_dtype) + " has " +
               std::to_string(expected));
  }
}

void check(const PackDesc& d, size_t i) {
  constexpr const char* kName = "PACK_DESC";
  if (d.op < kOpCopy || d.op > kOpFp8Scaled) refuse(kName, i, "op " + std::to_string(d.op) + " is unknown");
  check_elem_bytes(kName, i, d.elem_bytes);
  const bool holds_elements = check_extents(kName, i, d.extent);
  if (holds_elements && d.src == 0) refuse(kName, i, "src is null");
  if (d.op == kOpCopy) {
    check_copied_source(kName, i, d.src_dtype);
  } else {
    check_float_source(kName, i, d.src_dtype);
  }
  check_source_bytes(kName, i, d.src_dtype, d.elem_bytes);
  if (d.op == kOpCopy || d.op == kOpBf16) return;
  check_phases(kName, i, d.row_phase, d.col_phase);
  if (holds_elements && (d.extent[0] != 1 || d.extent[1] != 1))
    refuse(kName, i, "an fp8 box has more than two dimensions");
  if (holds_elements && d.scales == 0) refuse(kName, i, "scales is null");
}

void check(const AmaxDesc& d, size_t i) {
  constexpr const char* kName = "AMAX_DESC";
  check_float_source(kName, i, d.src_dtype);
  check_phases(kName, i, d.row_phase, d.col_phase);
  if (d.recipe_op != kOpFp8Block128 && d.recipe_op != kOpFp8Block128F32) {
    refuse(kName, i, "recipe_op " + std::to_string(d.recipe_op) + " is not OP_FP8_BLOCK128 or OP_FP8_BLOCK128_F32");
  }
  if (check_extents(kName, i, d.extent) && (d.src == 0 || d.amax == 0)) refuse(kName, i, "src or amax is null");
}

void check(const UnpackDesc& d, size_t i) {
  constexpr const char* kName = "UNPACK_DESC";
  check_elem_bytes(kName, i, d.elem_bytes);
  if (check_extents(kName, i, d.extent) && d.dst == 0) refuse(kName, i, "dst is null");
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

py::tuple field(const char* name, size_t offset, size_t nbytes) { return py::make_tuple(name, offset, nbytes); }

#define WSYNC_FIELD(Desc, name) fields.append(field(#name, offsetof(Desc, name), sizeof(Desc::name)))

py::dict descriptor_layout() {
  py::dict layout;
  {
    py::list fields;
    WSYNC_FIELD(PackDesc, src);
    WSYNC_FIELD(PackDesc, src_stride);
    WSYNC_FIELD(PackDesc, extent);
    WSYNC_FIELD(PackDesc, dst_offset);
    WSYNC_FIELD(PackDesc, wire_word);
    WSYNC_FIELD(PackDesc, scales);
    WSYNC_FIELD(PackDesc, scale_stride);
    WSYNC_FIELD(PackDesc, amax);
    WSYNC_FIELD(PackDesc, row_phase);
    WSYNC_FIELD(PackDesc, col_phase);
    WSYNC_FIELD(PackDesc, op);
    WSYNC_FIELD(PackDesc, src_dtype);
    WSYNC_FIELD(PackDesc, elem_bytes);
    WSYNC_FIELD(PackDesc, piece_idx);
    layout["PACK_DESC"] = py::make_tuple(sizeof(PackDesc), fields);
  }
  {
    py::list fields;
    WSYNC_FIELD(AmaxDesc, src);
    WSYNC_FIELD(AmaxDesc, src_stride);
    WSYNC_FIELD(AmaxDesc, extent);
    WSYNC_FIELD(AmaxDesc, amax);
    WSYNC_FIELD(AmaxDesc, amax_stride);
    WSYNC_FIELD(AmaxDesc, scales);
    WSYNC_FIELD(AmaxDesc, scale_stride);
    WSYNC_FIELD(AmaxDesc, row_phase);
    WSYNC_FIELD(AmaxDesc, col_phase);
    WSYNC_FIELD(AmaxDesc, src_dtype);
    WSYNC_FIELD(AmaxDesc, recipe_op);
    layout["AMAX_DESC"] = py::make_tuple(sizeof(AmaxDesc), fields);
  }
  {
    py::list fields;
    WSYNC_FIELD(UnpackDesc, dst);
    WSYNC_FIELD(UnpackDesc, dst_stride);
    WSYNC_FIELD(UnpackDesc, src_stride);
    WSYNC_FIELD(UnpackDesc, extent);
    WSYNC_FIELD(UnpackDesc, src_offset);
    WSYNC_FIELD(UnpackDesc, wire_word);
    WSYNC_FIELD(UnpackDesc, elem_bytes);
    WSYNC_FIELD(UnpackDesc, piece_idx);
    WSYNC_FIELD(UnpackDesc, op);
    WSYNC_FIELD(UnpackDesc, fill);
    layout["UNPACK_DESC"] = py::make_tuple(sizeof(UnpackDesc), fields);
  }
  {
    py::list fields;
    WSYNC_FIELD(TransformDesc, codes);
    WSYNC_FIELD(TransformDesc, code_stride);
    WSYNC_FIELD(TransformDesc, extent);
    WSYNC_FIELD(TransformDesc, scales);
    WSYNC_FIELD(TransformDesc, scale_stride);
    WSYNC_FIELD(TransformDesc, tensor_scale);
    WSYNC_FIELD(TransformDesc, dst);
    WSYNC_FIELD(TransformDesc, dst_stride);
    WSYNC_FIELD(TransformDesc, dst_scales);
    WSYNC_FIELD(TransformDesc, dst_scale_stride);
    WSYNC_FIELD(TransformDesc, row_phase);
    WSYNC_FIELD(TransformDesc, col_phase);
    WSYNC_FIELD(TransformDesc, recipe_op);
    WSYNC_FIELD(TransformDesc, op);
    WSYNC_FIELD(TransformDesc, dst_dtype);
    WSYNC_FIELD(TransformDesc, piece_idx);
    layout["TRANSFORM_DESC"] = py::make_tuple(sizeof(TransformDesc), fields);
  }
  return layout;
}

}  // namespace

void register_kernels(py::module_& m) {
  using py::arg;
  m.def("pack", &py_pack, arg("descs"), arg("dst_base"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("amax", &py_amax, arg("descs"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("scales_from_amax", &py_scales_from_amax, arg("descs"));
  m.def("unpack", &py_unpack, arg("descs"), arg("src_base"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("installed_digest", &py_installed_digest, arg("descs"), arg("num_threads") = 0, arg("isa") = "auto");
  m.def("digest", &py_digest, arg("address"), arg("nbytes"), arg("first_word"), arg("num_threads") = 0,
        arg("isa") = "auto");
  m.def("zero_digest", &zero_digest, arg("first_word"), arg("num_words"), py::call_guard<GilRelease>());
  m.def("memcpy", &py_memcpy, arg("dst"), arg("src"), arg("nbytes"), arg("num_threads") = 0);
  m.def("e4m3", &py_e4m3, arg("values"), "e4m3 codes of f32 values, one by one: the scalar codec, for tests.");
  m.def("best_isa", [] { return isa_name(parse_isa("auto")); });
  m.def("num_processors", &num_processors);
  m.def("descriptor_layout", &descriptor_layout, "For each record: its size and (field, offset, bytes).");
}

}  // namespace wsync
