#include <dlfcn.h>

#include <memory>
#include <string>

#include "api/cuda_library.h"
#include "api/gil.h"
#include "api/register.h"
#include "cuda/probe.h"

namespace py = pybind11;

namespace wsync {
namespace {

py::dict missing(const std::string& reason) {
  py::dict out;
  out["available"] = false;
  out["reason"] = reason;
  out["driver_version"] = 0;
  out["runtime_version"] = 0;
  out["devices"] = py::list();
  return out;
}

py::dict cuda_probe(const std::string& cudart) {
  std::string why;
  void* library = open_cuda_library(cudart, &why);
  if (library == nullptr) return missing(why);
  auto probe_fn = reinterpret_cast<WsyncCudaProbeFn>(dlsym(library, "wsync_cuda_probe"));
  if (probe_fn == nullptr) return missing("the CUDA library of wsync has no probe");

  auto probe = std::make_unique<WsyncCudaProbe>();
  {
    GilRelease release;
    probe_fn(probe.get());
  }
  py::list devices;
  for (int i = 0; i < probe->num_devices; ++i) {
    const WsyncCudaDevice& device = probe->devices[i];
    py::dict entry;
    entry["name"] = std::string(device.name);
    entry["compute_capability"] = py::make_tuple(device.capability_major, device.capability_minor);
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  std::string reason = probe->reason;
  if (reason.empty() && probe->num_devices == 0) reason = "the CUDA driver reports no device";
  py::dict out;
  out["available"] = probe->num_devices > 0;
  out["reason"] = reason;
  out["driver_version"] = probe->driver_version;
  out["runtime_version"] = probe->runtime_version;
  out["devices"] = devices;
  return out;
}

}  // namespace

void register_cuda(py::module_& m) {
  m.def("cuda_probe", &cuda_probe, py::arg("cudart") = "",
        "What the CUDA library finds: available, reason (why not), driver_version, runtime_version, devices.\n\n"
        "cudart: path of a libcudart to open first, for machines where the loader does not find one.");
}

}  // namespace wsync
