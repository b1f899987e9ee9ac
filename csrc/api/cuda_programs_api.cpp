// Programs of the CUDA kernels: compiled here, run by libwsync_cuda.so.
#include <pybind11/numpy.h>

#include <string>
#include <utility>

#include "api/cuda_library.h"
#include "api/descriptor_checks.h"
#include "api/gil.h"
#include "api/register.h"
#include "core/errors.h"
#include "cuda/program.h"

namespace py = pybind11;

namespace wsync {
namespace {

using cuda::Program;

template <typename Desc>
std::pair<const Desc*, size_t> checked_records(const py::array& array, const char* record) {
  if (array.ndim() != 1 || array.itemsize() != static_cast<py::ssize_t>(sizeof(Desc)) ||
      (array.size() > 1 && array.strides(0) != array.itemsize())) {
    throw Error("ConfigError", std::string(record) + " takes a contiguous vector of records of " +
                                   std::to_string(sizeof(Desc)) + " bytes, but the array has items of " +
                                   std::to_string(array.itemsize()) + " bytes");
  }
  const auto* descs = static_cast<const Desc*>(array.data());
  const auto n = static_cast<size_t>(array.size());
  for (size_t i = 0; i < n; ++i) check(descs[i], i);
  return {descs, n};
}

template <typename Desc>
Program compile(Program (*compiler)(const Desc*, size_t), const py::array& array, const char* record) {
  const auto [descs, n] = checked_records<Desc>(array, record);
  GilRelease release;
  return compiler(descs, n);
}

Program scales(const py::array& array) {
  const auto [descs, n] = checked_records<AmaxDesc>(array, "AMAX_DESC");
  for (size_t i = 0; i < n; ++i) {
    if (descs[i].scales == 0 && descs[i].extent[0] * descs[i].extent[1] != 0) refuse("AMAX_DESC", i, "scales is null");
  }
  return cuda::scales_program(descs, n);
}

Program digest(uint64_t address, uint64_t num_bytes, uint64_t first_word) {
  if (address == 0 && num_bytes != 0) throw Error("ConfigError", "address is null");
  return cuda::digest_program(address, num_bytes, first_word);
}

py::array_t<uint8_t> bytes_of(const Program& program) {
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(program.bytes.size()), program.bytes.data());
}

py::list launches_of(const Program& program) {
  py::list out;
  for (const WsyncCudaLaunch& l : program.launches) {
    out.append(py::make_tuple(l.kernel, l.num_units, l.records, l.units));
  }
  return out;
}

void require(int error, const char* what) {
  if (error == 0) return;
  const auto name = reinterpret_cast<WsyncCudaErrorFn>(cuda_function("wsync_cuda_error"));
  throw Error("WsyncError", std::string(what) + " failed on the GPU: " + name(error));
}

void check_address(const char* name, uint64_t address, bool required) {
  if (address == 0 && required) throw Error("ConfigError", std::string(name) + " is null");
  if (address % 16 != 0) {
    throw Error("ConfigError",
                std::string(name) + " is at " + std::to_string(address) + ", not a multiple of 16 as kernels need it");
  }
}

void run(const Program& program, uint64_t bytes, uint64_t base, uint64_t result, uint64_t stream) {
  check_address("the program on the device", bytes, !program.launches.empty());
  check_address("the base of the bucket", base, program.needs_base);
  check_address("the result", result, true);
  const auto reset = reinterpret_cast<WsyncCudaResetFn>(cuda_function("wsync_cuda_reset"));
  const auto run_fn = reinterpret_cast<WsyncCudaRunFn>(cuda_function("wsync_cuda_run"));
  auto* on = reinterpret_cast<void*>(stream);
  auto* into = reinterpret_cast<void*>(result);
  GilRelease release;
  require(reset(into, on), "resetting the result");
  require(run_fn(program.launches.data(), static_cast<int>(program.launches.size()), reinterpret_cast<void*>(bytes),
                 reinterpret_cast<void*>(base), into, on),
          "a kernel");
}

}  // namespace

void register_cuda_programs(py::module_& m) {
  using py::arg;
  py::class_<Program>(m, "CudaProgram", "Descriptors compiled for the GPU: bytes to copy there, and launches.")
      .def_property_readonly("bytes", &bytes_of)
      .def_property_readonly("launches", &launches_of, "(kernel, num_units, records, units) of each launch.")
      .def("run", &run, arg("bytes"), arg("base"), arg("result"), arg("stream"),
           "Starts the launches on a stream. All arguments are addresses on the device, and the stream's handle.");
  m.def("cuda_pack", [](const py::array& a) { return compile<PackDesc>(cuda::pack_program, a, "PACK_DESC"); });
  m.def("cuda_amax", [](const py::array& a) { return compile<AmaxDesc>(cuda::amax_program, a, "AMAX_DESC"); });
  m.def("cuda_scales_from_amax", &scales);
  m.def("cuda_unpack", [](const py::array& a) { return compile<UnpackDesc>(cuda::unpack_program, a, "UNPACK_DESC"); });
  m.def("cuda_installed_digest",
        [](const py::array& a) { return compile<UnpackDesc>(cuda::installed_program, a, "UNPACK_DESC"); });
  m.def("cuda_transform",
        [](const py::array& a) { return compile<TransformDesc>(cuda::transform_program, a, "TRANSFORM_DESC"); });
  m.def("cuda_digest", &digest, arg("address"), arg("nbytes"), arg("first_word"));
}

}  // namespace wsync
